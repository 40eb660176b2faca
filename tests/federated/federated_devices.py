"""Run by test_devices: rounds on eight simulated devices, three engines, a float64 loop beside."""

import os

if __name__ == "__main__":  # not when pytest looks for doctests
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    )

import federated_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dpjax.federated import (
    Algorithm,
    Clients,
    LocalResult,
    client_mesh,
    fed_avg,
    init_federated,
    run_round,
    scaffold,
)

SIZES = (7, 1, 0, 12, 4, 5, 3, 0, 9, 2, 6)
RATE = 0.2
COHORTS = (tuple(range(11)), (3, 8, 2, 0, 10), (4,))


def loss_fn(params, example):
    return (jnp.tanh(jnp.dot(params["a"], example["x"]) + params["b"]) - example["y"]) ** 2


def population():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 4)).astype(np.float32)
    y = np.tanh(x @ [1.0, -1.0, 0.5, 0.2]).astype(np.float32)
    rows = np.split(rng.permutation(len(x)), np.cumsum(SIZES)[:-1])
    return Clients({"x": x, "y": y}, tuple(rows), tuple(f"c{n}" for n in range(len(SIZES))))


def start():
    return {"a": jnp.array([0.3, 0.1, -0.2, 0.4], jnp.float32), "b": jnp.float32(0.05)}


def batches_of(cohort, ids):
    """What each client trains on, read from the cohort's own tables."""
    found = {}
    for s, c in zip(*np.nonzero(cohort.is_client), strict=True):
        first, count = cohort.first_step[s, c], cohort.num_steps[s, c]
        batches = [
            [
                (np.float64(cohort.examples["x"][s, r]), float(cohort.examples["y"][s, r]))
                for r in rows[rows >= 0]
            ]
            for rows in cohort.batches[s, first : first + count]
        ]
        found[int(cohort.client[s, c])] = (batches, int(cohort.num_examples[s, c]))
    return [found[k] for k in ids]


def expected(name, shards):
    """Parameters after each round, by the loop."""
    people, w = population(), {k: np.float64(v) for k, v in start().items()}
    control, variates = reference.zeros(w), [reference.zeros(w) for _ in SIZES]
    for ids, cohort in cohorts(people, shards):
        some = batches_of(cohort, ids)
        if name == "fed_avg":
            w = reference.fed_avg(w, some, RATE)
        else:
            w, control, variates = reference.scaffold(
                w, control, variates, some, ids, RATE, len(SIZES)
            )
        yield w


def cohorts(people, shards):
    for number, ids in enumerate(COHORTS):
        key = jax.random.key(number)
        yield (
            ids,
            people.cohort(ids, key, batch_size=3, num_shards=shards, cohort_size=len(people)),
        )


ALGORITHMS = {
    "fed_avg": fed_avg(loss_fn, optax.sgd(RATE)),
    "scaffold": scaffold(loss_fn, RATE, len(SIZES)),
}


def run(name, shards, engine, params=None, mesh=None):
    people, algorithm = population(), ALGORITHMS[name]
    state = init_federated(algorithm, start() if params is None else params, len(people))
    found = []
    for _, cohort in cohorts(people, shards):
        state, info = run_round(
            algorithm, state, cohort, jax.random.key(9), engine=engine, mesh=mesh
        )
        assert int(info.sensitive_num_clients) == cohort.num_clients
        found.append(jax.tree.map(np.asarray, state.params))
    return state, found


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        for leaf in one:
            np.testing.assert_allclose(one[leaf], other[leaf], rtol=1e-4, atol=1e-6)


def engines_agree():
    wanted = {name: list(expected(name, 1)) for name in ALGORITHMS}
    for name, shards in (("fed_avg", 1), ("fed_avg", 2), ("fed_avg", 8), ("scaffold", 8)):
        _, mapped = run(name, shards, "shard_map")
        close(mapped, wanted[name])
        close(run(name, shards, "jit")[1], mapped)
        if shards > 1:
            # The same sums in the same order: to the bit.
            jax.tree.map(np.testing.assert_array_equal, mapped, run(name, shards, "pmap")[1])
    print("engines agree")


def parameters_stay_sharded():
    mesh = client_mesh(8, model_devices=2)
    assert dict(mesh.shape) == {"clients": 4, "model": 2}
    spec = NamedSharding(mesh, PartitionSpec("model"))
    params = start() | {"a": jax.device_put(start()["a"], spec)}
    state, found = run("scaffold", 4, "shard_map", params, mesh)
    close(found, list(expected("scaffold", 4)))
    for leaf in (state.params["a"], state.server.control["a"]):
        assert leaf.sharding.is_equivalent_to(spec, 1), leaf.sharding
        assert {s.data.shape for s in leaf.addressable_shards} == {(2,)}
    assert state.params["b"].sharding.is_fully_replicated
    print("parameters stay sharded")


def updates_are_collected():
    """From eight devices: a median over clients, and sums modulo 2^32."""
    people = population()

    def local_update(server, client, data, key):
        examples, is_real = data.batch(jnp.int32(0))
        total = jnp.sum(jnp.where(is_real[:, None], examples["x"], 0.0), axis=0)
        code = jnp.uint32(0xC0000001) * data.num_examples.astype(jnp.uint32)
        return LocalResult({"x": total, "code": code}, jnp.float32(2), client, {})

    def init(params):
        return {"params": params}, ()

    def server_update(server, aggregate):
        return {"params": aggregate.update | {"weight": aggregate.weight}}

    def median(updates, weights):
        middle = jnp.nanmedian(jnp.where(weights[:, None] > 0, updates["x"], jnp.nan), axis=0)
        return {"x": middle, "code": jnp.sum(updates["code"], dtype=jnp.uint32)}

    zeros = {"x": jnp.zeros(4), "code": jnp.uint32(0), "weight": jnp.float32(0)}
    for combine in (None, median):
        algorithm = Algorithm("sends", init, local_update, server_update, combine=combine)
        for engine in ("shard_map", "pmap", "jit"):
            state = init_federated(algorithm, zeros, len(people))
            state = state._replace(server={"params": zeros})
            cohort = people.cohort(
                COHORTS[1], jax.random.key(0), batch_size=None, num_shards=8, cohort_size=5
            )
            state, _ = run_round(algorithm, state, cohort, jax.random.key(1), engine=engine)
            sums = np.stack([people.examples["x"][people.rows[k]].sum(0) for k in COHORTS[1]])
            wanted = sums.mean(0) if combine is None else np.median(sums, axis=0)
            got = state.server["params"]
            np.testing.assert_allclose(got["x"], wanted, rtol=1e-5, atol=1e-6)
            size = sum(SIZES[k] for k in COHORTS[1])
            assert int(got["code"]) == 0xC0000001 * size % 2**32
            assert float(got["weight"]) == 10
    print("updates are collected")


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    engines_agree()
    parameters_stay_sharded()
    updates_are_collected()
