"""The order of events in federated.py, and its tables."""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from federated_peers import Peer, environment
from federated_workloads import Workload, plain_vmap, workload

from dpjax.federated import FederatedState, init_federated, private, run_round
from dpjax.mechanism import DPSGD

OURS = "dpjax"
PRIVATE = "dpjax, private"
VMAP = "plain vmap"
COHORTS = {"cpu": (64, 1_000, 10_000), "smoke": (4, 16)}


class Row(NamedTuple):
    """``run(number, check)`` runs one round; CPU seconds, and the loss where it was asked for."""

    name: str
    run: Callable[[int, bool], tuple[float, float | None]]
    times: list[float]


def run(options: argparse.Namespace) -> int:
    """All workloads. 1 if losses do not agree, else 0."""
    device = jax.devices()[0]
    print(f"{device.device_kind} {platform.machine()}, jax {jax.__version__}", flush=True)
    results: dict[str, Any] = {"jax": jax.__version__, "workloads": {}}
    agree = True
    for name in options.workloads:
        measured = growth(options) if name == "flat" else compare(name, options)
        agree = agree and measured.get("agree", True)
        results["workloads"][name] = measured
        if options.output:  # after each: a long run that is cut off leaves what it has
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if agree else 1


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One workload against its peers."""
    work = workload(name, options.preset)
    count = sum(x.size for x in work.params.values())
    described = f"{len(work.people)} clients x {work.steps} steps x batch {work.batch_size}"
    print(f"\n## {name}: {described}, {count:,} parameters\n", flush=True)
    rounds = options.rounds or {"smoke": 1}.get(options.preset, 3 if name == "cnn" else 9)
    with contextlib.ExitStack() as stack:
        rows = [own(work), own_private(work)]
        if name == "mlp":
            rows.append(vmapped(work))
        versions = {}
        for peer in options.peers:
            if peer == "flower" and name == "cnn":
                continue  # no bound is set for it, and it takes minutes
            process = Peer(peer, environment(peer, options.environments), work, options.core)
            stack.callback(process.close)
            versions |= process.versions
            rows.append(Row(peer, asking(process), []))
        losses = {row.name: row.run(0, True)[1] for row in rows}
        for number in range(1, rounds + 1):
            for row in rows[:: -1 if number % 2 else 1]:
                row.times.append(row.run(number, False)[0])
    return _table(work, rows, losses, versions)


def _table(work: Workload, rows: list[Row], losses: dict, versions: dict) -> dict[str, Any]:
    measured: dict[str, Any] = {"versions": versions, "rows": {}}
    print("| | CPU s per round | clients per CPU s | dpjax is faster by | loss after one |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        ratios = [a / b for a, b in zip(row.times, rows[0].times, strict=True)]
        seconds, ratio = statistics.median(row.times), statistics.median(ratios)
        loss = losses[row.name]
        measured["rows"][row.name] = {"cpu": row.times, "ratio": ratio, "loss": loss}
        shown = f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        rate = len(work.people) / seconds
        print(f"| {row.name} | {seconds:.3f} | {rate:.0f} | {shown} | {loss:.5f} |", flush=True)
    wanted = losses[OURS]
    apart = {n: abs(x - wanted) for n, x in losses.items() if n != PRIVATE}
    measured["agree"] = all(d < 2e-4 * max(1.0, abs(wanted)) for d in apart.values())
    print(f"\nlosses {'agree' if measured['agree'] else 'DO NOT AGREE'}", versions or "")
    return measured


def own(work: Workload, name: str = OURS, algorithm: Any = None) -> Row:
    """`run_round`, with the host's layout of the cohort."""
    algorithm = work.algorithm if algorithm is None else algorithm
    state: list[FederatedState] = [init_federated(algorithm, work.params, len(work.people))]

    def one(number, check):
        start = time.process_time()
        state[0], _ = jax.block_until_ready(
            run_round(algorithm, state[0], work.cohort(number), jax.random.key(1))
        )
        taken = time.process_time() - start
        return taken, _loss(work, state[0].params) if check else None

    return Row(name, one, [])


def own_private(work: Workload) -> Row:
    """The same with user-level privacy: clipped, summed, noised."""
    everybody = len(work.people)
    mechanism = DPSGD(
        l2_clip_norm=1.0,
        sampling_probability=0.5,
        iterations=1_000,
        noise_multiplier=1.0,
        normalize_by=float(everybody),
        population=everybody,
    )
    return own(work, PRIVATE, private(work.algorithm, mechanism, jax.random.key(2)))


def vmapped(work: Workload) -> Row:
    round_of, params = plain_vmap(work), [work.params]
    data = jax.tree.map(lambda x: jnp.asarray(x[0]), work.cohort(0).examples)

    def one(number, check):
        start = time.process_time()
        params[0] = jax.block_until_ready(round_of(params[0], data))
        taken = time.process_time() - start
        return taken, _loss(work, params[0]) if check else None

    return Row(VMAP, one, [])


def asking(peer: Peer) -> Callable[[int, bool], tuple[float, float | None]]:
    def one(number, check):
        reply = peer.round(check)
        return reply["cpu"], reply.get("loss")

    return one


def _loss(work: Workload, params: Any) -> float:
    data, total = work.people.examples, 0.0
    size = len(data["y"])
    mean = jax.jit(lambda p, some: jnp.sum(jax.vmap(work.loss_fn, (None, 0))(p, some)))
    for start in range(0, size, 500):
        some = jax.tree.map(lambda x, s=start: x[s : s + 500], data)
        total += float(mean(params, some))
    return total / size


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of a client in ever larger cohorts."""
    import dpjax.federated.round as rounds

    print("\n## flat: one step x batch 20 for each client of ever larger cohorts\n")
    print("| clients | CPU ms per client | of it layout | temporary MB | examples MB |")
    print("| --- | --- | --- | --- | --- |")
    measured: dict[str, Any] = {}
    for clients in COHORTS[options.preset]:
        work = workload("flat", options.preset, clients)
        state = init_federated(work.algorithm, work.params, clients)
        times, layouts = [], []
        for number in range(1 + (options.rounds or (1 if options.preset == "smoke" else 3))):
            start = time.process_time()
            cohort = work.cohort(number)
            laid_out = time.process_time()
            state, _ = jax.block_until_ready(
                run_round(work.algorithm, state, cohort, jax.random.key(1))
            )
            times.append(time.process_time() - start)
            layouts.append(laid_out - start)
        compiled = rounds._compiled(work.algorithm, "jit", None, 1, None)
        analysis = compiled.lower(state, cohort, jax.random.key(1)).compile().memory_analysis()
        row = {
            "ms": 1e3 * statistics.median(times[1:]) / clients,
            "layout_ms": 1e3 * statistics.median(layouts[1:]) / clients,
            "temporary_mb": analysis.temp_size_in_bytes / 1e6,
            "examples_mb": sum(np.asarray(x).nbytes for x in jax.tree.leaves(cohort)) / 1e6,
        }
        measured[str(clients)] = row
        numbers = " | ".join(f"{row[k]:.3g}" for k in row)
        print(f"| {clients} | {numbers} |", flush=True)
    return measured
