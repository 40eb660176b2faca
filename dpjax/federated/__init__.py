"""Federated learning: clients train where their data lies, the server sees sums.

An algorithm is three pure functions in one file; `run_round` runs any of them over devices.
"""

from dpjax.federated.aggregation import Aggregator, fixed_point, plain, with_aggregator
from dpjax.federated.algorithm import (
    Aggregate,
    Algorithm,
    LocalData,
    LocalResult,
    batch_gradient,
    difference,
    example_weight,
    local_training,
    server_step,
)
from dpjax.federated.boundary import (
    CheckedUpdate,
    Rejection,
    Rejections,
    UpdateMessage,
    check_update,
    pack_update,
    read_message,
    unpack_update,
)
from dpjax.federated.clients import Clients, Cohort, CohortShape, clients_by
from dpjax.federated.compression import quantised, quantised_bytes, top_k, top_k_bytes
from dpjax.federated.distributed_privacy import (
    DistributedPrivacy,
    DistributedServer,
    distributed,
)
from dpjax.federated.dp_ftrl import dp_ftrl
from dpjax.federated.exact_lora import exact_lora, with_kernels
from dpjax.federated.fed_avg import fed_avg
from dpjax.federated.fed_nova import fed_nova
from dpjax.federated.fed_prox import fed_prox
from dpjax.federated.local_privacy import (
    local_dp_event,
    locally_private,
    locally_private_laplace,
)
from dpjax.federated.mime_lite import mime_lite
from dpjax.federated.partition import (
    label_counts,
    partition_dirichlet,
    partition_iid,
    partition_shards,
)
from dpjax.federated.personalised import personal_params, personalised
from dpjax.federated.private import (
    PrivateServer,
    Simulated,
    check_private_state,
    private,
    sample_cohort,
    scaled_to_cohort,
)
from dpjax.federated.robust import coordinate_median, krum, norm_bounded, robust, trimmed_mean
from dpjax.federated.round import (
    FederatedState,
    RoundInfo,
    client_mesh,
    init_federated,
    run_round,
    tune_clients_per_step,
)
from dpjax.federated.scaffold import scaffold
from dpjax.federated.training import FederatedTrainState, LocalWork, fit, init_training
from dpjax.federated.worker import Worker
from dpjax.federated.worker_pointer import Pointer
from dpjax.federated.worker_policy import Policy
from dpjax.federated.worker_server import connect, make_certificate, serve

__all__ = [
    "Aggregate",
    "Aggregator",
    "Algorithm",
    "CheckedUpdate",
    "Clients",
    "Cohort",
    "CohortShape",
    "DistributedPrivacy",
    "DistributedServer",
    "FederatedState",
    "FederatedTrainState",
    "LocalData",
    "LocalResult",
    "LocalWork",
    "Pointer",
    "Policy",
    "PrivateServer",
    "Rejection",
    "Rejections",
    "RoundInfo",
    "Simulated",
    "UpdateMessage",
    "Worker",
    "batch_gradient",
    "check_private_state",
    "check_update",
    "client_mesh",
    "clients_by",
    "connect",
    "coordinate_median",
    "difference",
    "distributed",
    "dp_ftrl",
    "exact_lora",
    "example_weight",
    "fed_avg",
    "fed_nova",
    "fed_prox",
    "fit",
    "fixed_point",
    "init_federated",
    "init_training",
    "krum",
    "label_counts",
    "local_dp_event",
    "local_training",
    "locally_private",
    "locally_private_laplace",
    "make_certificate",
    "mime_lite",
    "norm_bounded",
    "pack_update",
    "partition_dirichlet",
    "partition_iid",
    "partition_shards",
    "personal_params",
    "personalised",
    "plain",
    "private",
    "quantised",
    "quantised_bytes",
    "read_message",
    "robust",
    "run_round",
    "sample_cohort",
    "scaffold",
    "scaled_to_cohort",
    "serve",
    "server_step",
    "top_k",
    "top_k_bytes",
    "trimmed_mean",
    "tune_clients_per_step",
    "unpack_update",
    "with_aggregator",
    "with_kernels",
]
