"""The ServerApp. Its options come from [tool.flwr.app.config] and `flwr run --run-config`."""

from dpjax.federated.flower import ServerOptions, server_app
from hospitals.task import plan


def options(context) -> ServerOptions:
    """How the server runs."""
    config = context.run_config
    return ServerOptions(
        rounds=config["rounds"],
        folder=config["folder"],
        timeout=config["timeout"],
        wait_for=config["wait-for"],
    )


app = server_app(plan(), options)
