"""A federated run: its configuration, and the parts that are made from it.

On disk it is a run folder like any other; ``run.json`` also holds the federated configuration.
"""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from dpjax import accounting
from dpjax.data import (
    Dataset,
    Record,
    Tokenizer,
    UserDataset,
    by_user,
    dataset_from_records,
    stable_id,
)
from dpjax.errors import DpjaxError
from dpjax.federated import (
    Algorithm,
    Clients,
    LocalWork,
    Simulated,
    client_mesh,
    exact_lora,
    fed_avg,
    fed_nova,
    fed_prox,
    fixed_point,
    mime_lite,
    partition_dirichlet,
    partition_iid,
    partition_shards,
    private,
    scaffold,
    scaled_to_cohort,
    with_aggregator,
    with_kernels,
)
from dpjax.mechanism import DPSGD
from dpjax.models import LoRA, Tuning
from dpjax.runs.config import TrainConfig, default_delta, tuning_of
from dpjax.runs.sources import BUNDLED, Start, make_datasets, read_records
from dpjax.types import LossFn, RandomKey

Name = Literal[
    "fed_avg",
    "fed_prox",
    "fed_adam",
    "fed_yogi",
    "fed_adagrad",
    "fed_avg_momentum",
    "scaffold",
    "fed_nova",
    "mime_lite",
]
# A coordinate of an update without a clip norm; larger ones are cut and counted.
_LARGEST_VALUE = 4.0
_SERVER_RATES = {"fed_adam": 3e-3, "fed_yogi": 3e-3, "fed_adagrad": 1e-2}


@dataclasses.dataclass(frozen=True)
class FederateConfig:
    """Train across clients that keep their records; the guarantee is for a whole client."""

    data: str
    """Records: as for `dpjax train`."""
    output: str = "runs/federate"
    """Run folder; must not hold another run."""

    text_field: str | None = None
    """Field with the text (default: "text" or the only field)."""
    user_field: str | None = None
    """Field with the person's id, for --partition user."""
    label_field: str | None = None
    """Field with the label, for --partition dirichlet and shards."""
    partition: Literal["user", "iid", "dirichlet", "shards"] = "user"
    """Who holds what: each person is a client, or records are dealt to --num-clients, alike (iid)
    or by label (dirichlet, shards)."""
    num_clients: int | None = None
    """For all partitions but user."""
    concentration: float = 0.5
    """For dirichlet: small is uneven."""
    max_examples_per_client: int = 64
    """Bound on one client's records; more are dropped."""
    sequence_length: int = 64
    """Tokens per record; longer records are cut."""
    tokenizer: str = "auto"
    """As for `dpjax train`."""
    held_out: float = 0.1
    """Share of the people kept for evaluation."""
    held_out_data: str | None = None
    """Instead of that share: records of their own, from a source like --data."""

    model: str = "nano"
    """As for `dpjax train`: a preset, "smollm2", a folder or a hub id."""
    tuning: Literal["auto"] | Tuning = "auto"
    """What is trained and sent: all ("full"), adapters ("lora"), the last layers, or biases."""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    """Low-rank adapters, for --tuning lora; their matrices are averaged one by one."""
    exact_lora: bool = False
    """Average the adapters' products instead, as the mean of the clients' models is; a client then
    sends as much as the adapted matrices hold. With --algorithm fed_avg."""

    algorithm: Name = "fed_avg"
    """How clients and server learn."""
    iterations: int = 100
    """Rounds."""
    cohort_size: int = 32
    """Clients in a round, on average."""
    local_epochs: int = 1
    """Passes of a client over its records in a round."""
    local_batch_size: int = 8
    """Records of one local step."""
    max_local_steps: int | None = None
    """Cuts every client's work."""
    client_learning_rate: float = 0.1
    """Of the clients' SGD."""
    server_learning_rate: float | None = None
    """Default: 1 where the server takes the mean change, 3e-3 for adam and yogi."""
    proximal: float = 0.01
    """mu of fed_prox."""

    target_epsilon: float | None = 8.0
    """Privacy budget of a client in nats; None with --noise-multiplier."""
    target_delta: float | None = None
    """Failure probability (default: n^-1.1 of the number of clients, rounded down)."""
    noise_multiplier: float | None = None
    """Instead of a budget: noise stddev / sensitivity; 0 trains without privacy."""
    l2_clip_norm: float = 1.0
    """Largest L2 norm of what one client sends."""
    adaptive_quantile: float | None = None
    """Let the clip norm follow this quantile of the norms, e.g. 0.5, for 1% of the budget."""
    sampling: Literal["poisson", "cyclic"] = "poisson"
    """How cohorts are drawn: at random, which must stay secret, or in a fixed order."""
    correlated_noise: Literal["banded", "tree", "blt"] | None = None
    """Noise that later rounds partly take back; with --sampling cyclic (DP-FTRL is fed_avg with
    "tree" and a momentum)."""
    accountant: accounting.Accountant = "rdp"
    """Accountant that calibrates the noise; reports state both."""
    imagined_cohort: int | None = None
    """Try out the noise of a larger cohort: the budget is then that run's, which is marked
    SIMULATED wherever it is shown, beside the epsilon that this run really has."""
    ledger: str | None = None
    """Ledger file (default: in the run folder)."""
    aggregation: Literal["plain", "fixed_point"] = "plain"
    """How updates are summed: float32, or the integers that secure aggregation sums."""

    devices: int = 1
    """Devices over which clients are shared out."""
    engine: Literal["shard_map", "pmap", "jit"] = "shard_map"
    """How; all give the same numbers."""
    clients_per_step: int | Literal["auto"] = "auto"
    """Clients that a device trains side by side: 1 is best on CPUs, more on accelerators."""

    seed: int | None = None
    """Fixes all randomness, for research: a known seed means no guarantee in the real world."""
    checkpoint_every: int = 10
    """Rounds between checkpoints."""
    intended_use: str = "not stated"
    """One line for the privacy card."""


class Federation(NamedTuple):
    """What a federated run has beside the parts of every run."""

    config: FederateConfig
    clients: Clients
    mesh: jax.sharding.Mesh
    local: LocalWork
    simulated: Simulated | None = None  # where a larger cohort is imagined


_SHARED = [
    field.name
    for field in dataclasses.fields(FederateConfig)
    if field.name in {f.name for f in dataclasses.fields(TrainConfig)}
]


def base_config(config: FederateConfig) -> TrainConfig:
    """The run's data, model, budget and bookkeeping: one example is one client.

    Example:
      >>> base = base_config(FederateConfig("notes.jsonl", cohort_size=20, iterations=7))
      >>> base.unit, base.expected_batch_size, base.iterations
      ('user', 20, 7)
    """
    shared = {name: getattr(config, name) for name in _SHARED if name != "label_field"}
    return TrainConfig(
        **shared,
        unit="user",
        max_examples_per_user=config.max_examples_per_client,
        expected_batch_size=config.cohort_size,
        microbatch_size=1,
        optimizer="sgd",
        learning_rate=config.client_learning_rate,
    )


def federate_config_from_dict(described: dict[str, Any]) -> FederateConfig:
    """Reverses ``dataclasses.asdict``, also after JSON.

    Example:
      >>> config = FederateConfig("notes.jsonl", lora=LoRA(4))
      >>> federate_config_from_dict(dataclasses.asdict(config)) == config
      True
    """
    return FederateConfig(**{**described, "lora": LoRA(**described["lora"])})


def client_datasets(config: FederateConfig, tokenizer: Tokenizer) -> tuple[UserDataset, Dataset]:
    """Training rows grouped by client, and held-out rows of people who are no clients."""
    base = base_config(config)
    if config.partition == "user":
        if config.user_field is None and config.data not in BUNDLED:
            raise DpjaxError(
                "partition is 'user' without user_field; name the field with the person's id, or "
                "deal the records to --num-clients with --partition iid"
            )
        training, held_out = make_datasets(base, tokenizer)
        assert isinstance(training, UserDataset)
        return training, held_out
    if config.num_clients is None:
        raise DpjaxError(f"partition is {config.partition!r} without num_clients; say how many")
    read = dataclasses.replace(base, label_field=config.label_field)
    records = read_records(read, config.data)
    if config.held_out_data is not None:
        kept, apart = records, read_records(read, config.held_out_data)
    elif 0 < config.held_out < 1:
        # A record's side depends on its text alone, so duplicates stay together.
        is_apart = [stable_id("held out", r.text) < config.held_out * 2**63 for r in records]
        kept = [r for r, away in zip(records, is_apart, strict=True) if not away]
        apart = [r for r, away in zip(records, is_apart, strict=True) if away]
    else:
        raise DpjaxError(f"held_out is {config.held_out}; it must be a share in (0, 1), e.g. 0.1")
    dealt = _deal(config, kept)
    owners = np.zeros(len(kept), np.int64)
    for number, own in enumerate(dealt.rows):
        owners[own] = number
    owned = [
        record._replace(user=f"client-{owner}")
        for record, owner in zip(kept, owners.tolist(), strict=True)
    ]
    name = pathlib.Path(config.data).name
    rows = dataset_from_records(owned, tokenizer, config.sequence_length, name=name)
    rows = rows.bound_contributions(config.max_examples_per_client, seed=0)
    held_out = dataset_from_records(apart, tokenizer, config.sequence_length, name=name)
    if len(held_out) == 0:
        raise DpjaxError(f"the held-out part of {config.data} has no records; give more records")
    return by_user(rows, config.max_examples_per_client), held_out


def _deal(config: FederateConfig, records: list[Record]) -> Clients:
    assert config.num_clients is not None
    numbers = {"record": np.arange(len(records))}
    if config.partition == "iid":
        return partition_iid(numbers, config.num_clients, seed=0)
    if config.label_field is None:
        raise DpjaxError(
            f"partition is {config.partition!r} without label_field; name the field with the label"
        )
    labels = [str(record.label) for record in records]
    if config.partition == "shards":
        return partition_shards(numbers, labels, config.num_clients, seed=0)
    return partition_dirichlet(
        numbers, labels, config.num_clients, concentration=config.concentration, seed=0
    )


def clients_of(people: UserDataset) -> Clients:
    """Every person's own rows, without the padding."""
    held = people.loss_mask.any(axis=2)
    owner, _ = np.nonzero(held)
    examples = {"tokens": people.tokens[held], "loss_mask": people.loss_mask[held]}
    rows = tuple(np.flatnonzero(owner == number) for number in range(len(people)))
    return Clients(examples, rows, tuple(f"client-{n}" for n in range(len(people))))


def make_federation(config: FederateConfig, people: UserDataset) -> Federation:
    """Clients, devices and local work of a configuration."""
    for name in ("client_learning_rate", "local_epochs", "local_batch_size"):
        if not getattr(config, name) > 0:
            raise DpjaxError(f"{name} is {getattr(config, name)}; it must be positive")
    return Federation(
        config,
        clients_of(people),
        client_mesh(config.devices),
        LocalWork(config.local_batch_size, config.local_epochs, config.max_local_steps),
    )


def with_federated_part(config: FederateConfig, point: Start) -> Start:
    """The starting point, with the adapted matrices among the server's parameters if need be.

    Raises:
      DpjaxError: exact adapters without adapters, or with another algorithm.
    """
    if not config.exact_lora:
        return point
    if tuning_of(base_config(config)) != "lora" or config.algorithm != "fed_avg":
        raise DpjaxError(
            f"exact_lora is given with tuning {config.tuning!r} and algorithm {config.algorithm!r};"
            " it is for --tuning lora with --algorithm fed_avg"
        )
    trainable, frozen = with_kernels(point.trainable, point.frozen)
    return point._replace(trainable=trainable, frozen=frozen)


def make_algorithm(
    config: FederateConfig,
    mechanism: DPSGD,
    loss_fn: LossFn,
    num_clients: int,
    key: RandomKey,
) -> Algorithm:
    """The algorithm that a configuration asks for; under a private mechanism, with its noise.

    Args:
      key: of the noise.
    """
    client, uniform = optax.sgd(config.client_learning_rate), mechanism.is_private
    rate = config.server_learning_rate or _SERVER_RATES.get(config.algorithm, 1.0)
    servers = {
        "fed_adam": optax.adam(rate, b1=0.9, b2=0.99, eps=1e-3),
        "fed_yogi": optax.yogi(rate, b1=0.9, b2=0.99, eps=1e-3),
        "fed_adagrad": optax.adagrad(rate),
        "fed_avg_momentum": optax.sgd(rate, momentum=0.9),
    }
    server = servers.get(config.algorithm, optax.sgd(rate))
    if config.exact_lora:
        algorithm = exact_lora(loss_fn, client, config.lora.scaling, uniform_weights=uniform)
    elif config.algorithm == "fed_prox":
        algorithm = fed_prox(
            loss_fn, client, server, proximal=config.proximal, uniform_weights=uniform
        )
    elif config.algorithm == "scaffold":
        algorithm = scaffold(loss_fn, config.client_learning_rate, num_clients, server)
    elif config.algorithm == "fed_nova":
        algorithm = fed_nova(loss_fn, config.client_learning_rate, server)
    elif config.algorithm == "mime_lite":
        momentum = optax.sgd(config.client_learning_rate, momentum=0.9)
        algorithm = mime_lite(loss_fn, momentum, uniform_weights=uniform)
    else:
        algorithm = fed_avg(loss_fn, client, server, uniform_weights=uniform)
    if mechanism.is_private:
        algorithm = private(algorithm, mechanism, key)
    if config.aggregation == "plain":
        return algorithm
    # Rounding towards zero never raises a client's norm above the bound.
    code = fixed_point(
        _LARGEST_VALUE if not mechanism.is_private else max(mechanism.l2_clip_norm, 0.5),
        max_clients=num_clients,
        rounding="toward_zero",
    )
    weight = None if mechanism.is_private else config.max_examples_per_client
    return with_aggregator(algorithm, code, max_weight=weight)


def describe_federation(federation: Federation) -> str:
    """What clients do, in one line."""
    config, clients = federation.config, federation.clients
    sizes = clients.sizes
    work = f"{config.local_epochs} epoch" + ("s" if config.local_epochs > 1 else "")
    return (
        f"{config.algorithm}, clients of {sizes.min()} to {sizes.max()} records ({config.partition}"
        f" partition), each {work} in batches of {config.local_batch_size} at rate "
        f"{config.client_learning_rate:g}; {config.aggregation} sums on {config.devices} "
        f"device{'s' if config.devices > 1 else ''} ({config.engine})"
    )


def simulate_cohort(config: FederateConfig, mechanism: DPSGD) -> Simulated:
    """The run that has the noise of --imagined-cohort: its budget is the imagined run's.

    As many times more clients, too, so that each would take part as often.

    Example:
      >>> config = FederateConfig("notes.jsonl", imagined_cohort=1000)
      >>> mechanism = DPSGD(1.0, 0.1, 10, noise_multiplier=1.0, population=100)
      >>> simulate_cohort(config, mechanism).actual.noise_multiplier
      0.01
    """
    cohort, population = mechanism.expected_batch_size, mechanism.population
    assert config.imagined_cohort is not None and population is not None
    larger = max(population, round(population * config.imagined_cohort / cohort))
    delta = config.target_delta or default_delta(larger)
    if mechanism.target_delta is not None:
        mechanism = dataclasses.replace(mechanism, noise_multiplier=None, target_delta=delta)
    return scaled_to_cohort(mechanism, config.imagined_cohort, larger, delta)


def card_facts(federation: Federation, is_private: bool) -> dict[str, Any]:
    """What a federated run's card says otherwise than another's; fields of `CardInputs`."""
    config = federation.config
    norm = f" clipped to {config.l2_clip_norm:g}" if is_private else ""
    return {
        "optimizer": (
            f"{config.algorithm}: clients take {config.local_epochs} epochs of SGD at "
            f"{config.client_learning_rate:g}; the server sums their updates{norm}"
        ),
        "trust": (
            "a simulation: whoever runs it sees the raw records, every client's update and the "
            "noise key; everyone else sees what is released"
        ),
        # The server's state after every round is an output of the mechanism.
        "views": ("A", "W", "B"),
    }
