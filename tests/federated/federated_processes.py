"""Run by test_devices, twice at once: two processes, each with its own clients' data."""

import os
import sys

if __name__ == "__main__":  # not when pytest looks for doctests
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    )

import federated_devices as alone
import jax
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.federated import Clients, CohortShape, init_federated, run_round


def main(process, port):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    everybody = alone.population()
    own = [k for k in range(len(everybody)) if k % 2 == process]
    held = np.concatenate([everybody.rows[k] for k in own])
    # Only its own examples, renumbered; the other's clients are names without rows.
    place = {int(row): n for n, row in enumerate(held)}
    rows = tuple(
        np.array([place[int(r)] for r in everybody.rows[k]] if k in own else [], np.int64)
        for k in range(len(everybody))
    )
    people = Clients({n: x[held] for n, x in everybody.examples.items()}, rows, everybody.names)
    algorithm = alone.ALGORITHMS["scaffold"]
    state = init_federated(algorithm, alone.start(), len(people))
    shape = CohortShape(6, 24, 48, 3)

    def cohort(ids, number, **options):
        mine = [k for k in ids if k in own]
        key = jax.random.key(number)
        return people.cohort(mine, key, batch_size=3, num_shards=2, **options)

    for number, ids in enumerate(alone.COHORTS[:2]):
        state, info = run_round(
            algorithm, state, cohort(ids, number, shape=shape), jax.random.key(9)
        )
        assert int(info.sensitive_num_clients) == len(ids)
        print(*(float(x) for x in (*state.params["a"], state.params["b"])), flush=True)
    # What each client keeps is known everywhere.
    print(*(float(x) for x in np.asarray(state.clients["a"]).sum(0)), flush=True)
    for options, message in (
        ({"shape": shape._replace(steps=24 + process)}, "different shapes"),
        ({"shape": shape}, "pmap"),
    ):
        try:
            engine = "pmap" if message == "pmap" else "shard_map"
            run_round(algorithm, state, cohort(ids, 0, **options), jax.random.key(9), engine=engine)
            print("accepted", message, flush=True)
        except DpjaxError as error:
            assert message in str(error), error
            print("refused", message, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
