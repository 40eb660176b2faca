"""The ClientApp of a hospital. Its number and folder come from its SuperNode's --node-config."""

import jax

from dpjax.federated.flower import LocalSide, client_app
from hospitals.task import own_patients, plan


def local_side(context) -> LocalSide:
    """This machine's patients, number, keys and folder."""
    number = int(context.node_config["partition-id"])
    # The same seeds everywhere, so that the run can be compared with a simulation. Where clients
    # add noise themselves, each draws its seed from the operating system and keeps it.
    key, data_key = jax.random.key(1), jax.random.key(2)
    folder = context.node_config["state-folder"]
    return LocalSide(own_patients(number), number, key, data_key, folder)


app = client_app(plan(), local_side)
