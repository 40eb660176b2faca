"""The order of events in clipping.py, and its tables."""

import argparse
import contextlib
import json
import platform
import statistics
from typing import Any

import jax
import numpy as np
from clipping_measure import (
    HAS_JAX_PRIVACY,
    Opacus,
    OpacusError,
    Row,
    compile_step,
    gradient_bytes,
    host,
    memory_limit,
    relative_difference,
)
from clipping_options import OWN, fail
from clipping_workloads import Workload, workload

from dpjax.errors import DpjaxError

BASE = "non-private"
TORCH_BASE = "torch non-private"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def run(options: argparse.Namespace) -> int:
    """All workloads. 1 if own methods disagree on a norm, else 0."""
    device = jax.devices()[0]
    if options.preset == "gpu" and device.platform == "cpu":
        fail("--preset gpu found no GPU; use --preset cpu, or install JAX with its GPU plugin")
    pinned = "not pinned" if options.core is None else "one pinned core"
    described = f"{device.device_kind}, jax {jax.__version__}, {options.dtype}, {pinned}"
    print(f"{described}\n", flush=True)
    results = {
        "device": device.device_kind,
        "processor": platform.machine(),
        "jax": jax.__version__,
        "preset": options.preset,
        "dtype": options.dtype,
        "pinned": options.core is not None,
        "workloads": {},
    }
    agree = True
    for name in options.workloads:
        work = workload(name, options.preset, options.dtype, options.batch, options.remat)
        measured = measure(work, options)
        agree = agree and measured["own_methods_agree"]
        results["workloads"][name] = measured
        if options.output:  # after each: a long run that is cut off leaves what it has
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if agree else 1


def measure(work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles, checks, times and prints one workload."""
    examples = jax.tree.leaves(work.batch)[0].shape[0]
    count = sum(leaf.size for leaf in jax.tree.leaves(work.params))
    print(f"## {work.name}: {work.what}, batch {examples}, {count:,} trained parameters\n")
    with contextlib.ExitStack() as stack:
        rows, opacus = _compile(work, options, stack)
        agreement = _check(rows, opacus)
        for round_number in range(_repeats(work, options)):
            for row in rows[:: -1 if round_number % 2 else 1]:
                if row.call is not None:
                    cpu, wall = row.call()
                    row.cpu.append(cpu)
                    row.wall.append(wall)
    norms = [a["norms"] for m, a in agreement.items() if m in OWN]
    agree = all(n <= TOLERANCE[options.dtype] for n in norms)
    is_cpu = jax.devices()[0].platform == "cpu"
    summary = {row.method: _summary(row, rows[0], is_cpu) for row in rows}
    if opacus:
        for method in ("opacus-hooks", "opacus-ghost"):
            if method in summary and TORCH_BASE in summary:
                ratio = _ratio(_row(rows, method).cpu, _row(rows, TORCH_BASE).cpu)
                if ratio:
                    summary[method]["ratio_to_torch"] = ratio
                    summary[method]["note"] = f"{ratio[0]:.2f} of torch"
    _print_table(summary, is_cpu)
    _print_comparisons(rows, is_cpu)
    for method, found in agreement.items():
        parts = [f"{what} {value:.1e}" for what, value in found.items() if what != "against"]
        print(f"difference of {method} from {found['against']}: {', '.join(parts)}")
    if not agree:
        print(f"DISAGREEMENT: a norm differs by more than {TOLERANCE[options.dtype]:g}")
    print(flush=True)
    return {
        "what": work.what,
        "examples": examples,
        "trained_parameters": count,
        "remat": options.remat and work.name == "W5",
        "own_methods_agree": agree,
        "differences": agreement,
        "opacus": opacus.versions if opacus else None,
        "rows": summary,
    }


def _repeats(work: Workload, options: argparse.Namespace) -> int:
    if options.repeats is not None:
        return options.repeats
    if options.preset == "smoke":
        return 1
    return 2 if options.preset == "cpu" and work.name in ("W5", "GPT2") else 7


def _row(rows: list[Row], method: str) -> Row:
    return next(row for row in rows if row.method == method)


def _compile(work: Workload, options: argparse.Namespace, stack: contextlib.ExitStack):
    rows = [compile_step(work, BASE, options.dump_hlo)]
    limit = options.memory_limit * 1e9 if options.memory_limit else memory_limit()
    is_cpu = jax.devices()[0].platform == "cpu"
    for method in options.methods:
        if method.startswith("opacus"):
            continue
        if method.startswith("jax-privacy") and not HAS_JAX_PRIVACY:
            rows.append(Row(method, "not installed"))
            continue
        # Compiling is safe on a CPU and tells what is needed; a GPU may try kernels on real memory.
        if not is_cpu and method in ("vmap", "jax-privacy") and gradient_bytes(work) > limit:
            rows.append(Row(method, f"not run: over {gradient_bytes(work) / 1e9:.1f} GB"))
        elif method.endswith("-best"):
            rows.append(_best_microbatch(work, method, options, limit))
        else:
            rows.append(_affordable(_try_compile(work, method, options), limit))
    wanted = [m for m in options.methods if m.startswith("opacus")]
    if not wanted or work.config is None or work.config.tied or options.dtype != "float32":
        return rows, None
    if not options.opacus_python:
        return rows + [Row(m, "not run: give --opacus-python") for m in wanted], None
    try:
        opacus = Opacus(options.opacus_python, work, options.core)
    except OpacusError as error:
        return rows + [Row(m, f"not run: {error}") for m in wanted], None
    stack.callback(opacus.close)
    for method in (TORCH_BASE, *wanted):
        name = "plain" if method == TORCH_BASE else method
        rows.append(Row(method, call=lambda name=name: _times(opacus.ask("time", name))))
    return rows, opacus


def _times(reply: dict[str, Any]) -> tuple[float, float]:
    return reply["cpu"], reply["wall"]


def _try_compile(work: Workload, method: str, options: argparse.Namespace) -> Row:
    try:
        return compile_step(work, method, options.dump_hlo)
    except DpjaxError as error:
        return Row(method, f"n/a: {error}")


def _affordable(row: Row, limit: float) -> Row:
    if row.needed_bytes is not None and row.needed_bytes > limit:
        row.call = None
        row.note = f"not run: needs {row.needed_bytes / 1e9:.1f} GB"
    return row


def _best_microbatch(work: Workload, method: str, options: argparse.Namespace, limit: float) -> Row:
    """The microbatch size that took least in two calls; the whole batch is one of them."""
    examples = jax.tree.leaves(work.batch)[0].shape[0]
    per_example = gradient_bytes(work) / examples
    is_cpu = jax.devices()[0].platform == "cpu"
    best, least = None, float("inf")
    sizes = [m for m in options.microbatches if m < examples and examples % m == 0]
    for size in (*sizes, examples):
        if size * per_example > limit and method not in ("non-private-best", "auto-best"):
            continue
        row = _affordable(compile_step(work, method, None, size), limit)
        if row.call is not None:
            seconds = min(row.call()[0 if is_cpu else 1] for _ in range(2))
            if seconds < least:
                best, least = row, seconds
    if best is None:
        return Row(method, "not run: no microbatch size fits")
    if options.dump_hlo:
        path = options.dump_hlo / f"{work.name}_{method}.hlo.txt"
        path.write_text(best.compiled.as_text() or "", encoding="utf-8")
    return best


def _check(rows: list[Row], opacus: Opacus | None) -> dict[str, dict[str, Any]]:
    """Runs each step once; differences from the first own method, or the first clipped one."""
    expected: tuple[str, list[np.ndarray], np.ndarray | None] | None = None
    structure = jax.tree.structure(jax.eval_shape(lambda x: x, rows[0].arguments[0]))
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.call is None:
            continue
        if row.compiled is None:
            assert opacus is not None
            name = "plain" if row.method == TORCH_BASE else row.method
            try:
                reply = opacus.ask("check", name)
            except OpacusError as error:  # the process is gone, and with it all its rows
                for other in rows:
                    if other.call is not None and other.compiled is None:
                        other.call, other.note = None, f"not run: {error}"
                continue
            if reply["norms"] is not None and expected and expected[2] is not None:
                difference = _norm_difference(np.asarray(reply["norms"]), expected[2])
                found[row.method] = {"against": expected[0], "norms": difference}
            continue
        total, norms = jax.block_until_ready(row.compiled(*row.arguments))
        if jax.tree.structure(total) != structure:
            raise AssertionError(f"{row.method} returns another tree than the parameters'")
        if row.method.startswith(BASE):
            continue
        leaves, norms = host(total), None if norms is None else np.asarray(norms)
        if expected is None:
            expected = (row.method, leaves, norms)
            continue
        entry = {"against": expected[0], "sum": relative_difference(leaves, expected[1])}
        if norms is not None and expected[2] is not None:
            entry["norms"] = _norm_difference(norms, expected[2])
        found[row.method] = entry
    return found


def _norm_difference(norms: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative difference; infinite for a NaN, which no comparison catches."""
    difference = float(np.max(np.abs(norms - expected) / np.maximum(expected, 1e-12)))
    return difference if np.isfinite(difference) else float("inf")


def _ratio(times: list[float], base: list[float]) -> tuple[float, float, float] | None:
    """Median, least and largest over rounds."""
    ratios = [a / b for a, b in zip(times, base, strict=True)] if times and base else []
    return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def _summary(row: Row, base: Row, is_cpu: bool) -> dict[str, Any]:
    def share(value, whole):
        return value / whole if value is not None and whole else None

    return {
        "cpu_seconds": statistics.median(row.cpu) if row.cpu else None,
        "wall_seconds": statistics.median(row.wall) if row.wall else None,
        "time_ratio": _ratio(*((row.cpu, base.cpu) if is_cpu else (row.wall, base.wall))),
        "temp_bytes": row.temp_bytes,
        "temp_ratio": share(row.temp_bytes, base.temp_bytes),
        "flops": row.flops,
        "flops_ratio": share(row.flops, base.flops),
        "copied_bytes": row.copied_bytes,
        "compile_seconds": row.compile_seconds,
        "note": row.note,
        "rounds": {"cpu_seconds": row.cpu, "wall_seconds": row.wall},
    }


def _print_table(summary: dict[str, dict[str, Any]], is_cpu: bool) -> None:
    ratio = "CPU ratio" if is_cpu else "wall ratio"
    print(f"| step | CPU s | wall s | {ratio} (least, most) | temporary MB | ratio ", end="")
    print("| GFLOP | ratio | copies MB | note |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")

    def cell(value, form, scale=1.0):
        return "" if value is None else format(value / scale, form)

    for method, row in summary.items():
        spread = row["time_ratio"]
        cells = [
            method,
            cell(row["cpu_seconds"], ".3g"),
            cell(row["wall_seconds"], ".3g"),
            "" if spread is None else "{:.2f} ({:.2f}, {:.2f})".format(*spread),
            cell(row["temp_bytes"], ".1f", 1e6),
            cell(row["temp_ratio"], ".2f"),
            cell(row["flops"], ".2f", 1e9),
            cell(row["flops_ratio"], ".2f"),
            cell(row["copied_bytes"], ".0f", 1e6),
            row["note"],
        ]
        print(f"| {' | '.join(cells)} |")
    print()


def _print_comparisons(rows: list[Row], is_cpu: bool) -> None:
    """How "auto" stands against everything else that was timed."""
    times = {r.method: r.cpu if is_cpu else r.wall for r in rows if r.cpu}
    if "auto" not in times:
        return
    parts = []
    for method, other in times.items():
        ratio = _ratio(other, times["auto"])
        if method not in ("auto", BASE, TORCH_BASE) and ratio:
            parts.append(f"{method} {ratio[0]:.2f}")
    if parts:
        print(f"time of others over auto's: {', '.join(parts)}")
