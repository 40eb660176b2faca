"""A training run on disk: one folder with its plan, ledger, checkpoints, model, card and report.

run.json           the configuration and facts to compare on resume (public)
ledger.jsonl       every release, hash-chained (public)
audit.secret       decides the audit's canaries and coins: secret until `dpjax audit run`
checkpoints/       state with the noise key: secret, for resuming only
metrics.jsonl      training losses: private, not covered by epsilon
model/             the parameters to release
card.json, report.html
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import secrets
from typing import Any

import jax
import optax

from dpjax.auditing.coins import CoinCanaries, coin_canaries, commitment, with_coin_canaries
from dpjax.checkpoint import digest
from dpjax.data import Dataset, UserDataset
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.models import Model
from dpjax.report.files import write_whole
from dpjax.runs.config import (
    PRESETS,
    TrainConfig,
    default_delta,
    fresh_key,
    make_mechanism,
    make_optimizer,
    train_config_from_dict,
)
from dpjax.runs.federation import (
    FederateConfig,
    Federation,
    client_datasets,
    federate_config_from_dict,
    make_federation,
    simulate_cohort,
    with_federated_part,
)
from dpjax.runs.sources import Start, make_datasets, starting_point


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that one training run needs, made by `open_run`."""

    folder: pathlib.Path
    config: TrainConfig
    point: Start
    mechanism: DPSGD
    optimizer: optax.GradientTransformation
    training: Dataset | UserDataset
    held_out: Dataset
    facts: dict[str, Any]
    identifier: str
    canaries: CoinCanaries | None = None
    audit_secret: bytes | None = None
    federation: Federation | None = None  # of a federated run; its examples are clients

    @property
    def start(self) -> Model:
        """The whole model before training."""
        return self.point.model

    @property
    def config_sha256(self) -> str:
        """Of the configuration, without where its output goes."""
        public = {**self.facts["config"], "output": None}
        if "federate" in self.facts:
            public["federate"] = {**self.facts["federate"], "output": None}
        return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()

    @property
    def start_is_preset(self) -> bool:
        return self.config.model in PRESETS

    @property
    def delta(self) -> float:
        """The delta that this run's epsilon is stated at."""
        stated = self.config.target_delta
        return default_delta(len(self.training)) if stated is None else stated

    @property
    def ledger_path(self) -> pathlib.Path:
        return pathlib.Path(self.config.ledger or self.folder / "ledger.jsonl")


def _facts(
    config: TrainConfig,
    start: Start,
    training: Dataset | UserDataset,
    secret: bytes | None,
    federated: FederateConfig | None,
) -> dict[str, Any]:
    """What a resumed run must find unchanged; nothing in it depends on noise or keys."""
    facts = {
        "config": dataclasses.asdict(config),
        "data_sha256": training.fingerprint(),
        "tokenizer_sha256": start.model.tokenizer.fingerprint(),
        "frozen_sha256": digest(start.frozen) if jax.tree.leaves(start.frozen) else None,
        "versions": {name: importlib.metadata.version(name) for name in ("dpjax", "jax", "optax")},
        "platform": jax.default_backend(),
    }
    if federated is not None:
        facts["federate"] = dataclasses.asdict(federated)
    if secret is not None:
        facts["audit"] = {"canaries": config.audit_canaries, "commitment": commitment(secret)}
    # As a file would give them back: tuples are lists there.
    return json.loads(json.dumps(facts))


def open_run(
    config: TrainConfig, folder: pathlib.Path, federated: FederateConfig | None = None
) -> Run:
    """Reads the data, makes the model and calibrates the noise; writes nothing.

    Args:
      federated: of a federated run; ``config`` is then its `base_config`.
    """
    if config.checkpoint_every < 1:
        raise DpjaxError(f"checkpoint_every is {config.checkpoint_every}; use at least 1")
    # Public randomness: where parameters begin must not need the secret key.
    point = starting_point(config, fresh_key(0 if config.seed is None else config.seed))
    if federated is not None:
        point = with_federated_part(federated, point)
    start = point.model
    federation = None
    if federated is None:
        training, held_out = make_datasets(config, start.tokenizer)
    else:
        training, held_out = client_datasets(federated, start.tokenizer)
        federation = make_federation(federated, training)
    training.validate(start.config.vocabulary_size)
    held_out.validate(start.config.vocabulary_size)
    real, secret, canaries = len(training), None, None
    if config.audit_canaries:
        secret = _audit_secret(config, folder)
        rows = training.tokens.shape[1] if isinstance(training, UserDataset) else 1
        canaries = coin_canaries(
            secret, config.audit_canaries, start.tokenizer, config.sequence_length, rows
        )
        training = with_coin_canaries(training, canaries)
    longest = start.config.max_positions
    if start.config.positions == "learned" and config.sequence_length > longest:
        raise DpjaxError(
            f"sequence_length is {config.sequence_length}; the model has positions for {longest}"
        )
    mechanism = make_mechanism(config, len(training), real + config.audit_canaries / 2)
    if federation is not None and federation.config.imagined_cohort is not None:
        simulated = simulate_cohort(federation.config, mechanism)
        mechanism, federation = simulated.actual, federation._replace(simulated=simulated)
    return Run(
        folder,
        config,
        point,
        mechanism,
        make_optimizer(config),
        training,
        held_out,
        _facts(config, point, training, secret, federated),
        secrets.token_hex(8),
        canaries,
        secret,
        federation,
    )


def _audit_secret(config: TrainConfig, folder: pathlib.Path) -> bytes:
    """What the folder keeps, or a new one; from the seed if there is one."""
    path = folder / "audit.secret"
    if path.exists():
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
            commitment(secret)
        except (ValueError, DpjaxError):
            raise DpjaxError(f"{path} is corrupt; restore the file") from None
        return secret
    if (folder / "run.json").exists():
        raise DpjaxError(f"{path} is missing; without it nobody knows which canaries are in")
    if config.seed is not None:
        return hashlib.sha256(f"dpjax audit {config.seed}".encode()).digest()
    return secrets.token_bytes(32)


def create(run: Run) -> None:
    """Claims the run folder and writes the plan."""
    if (run.folder / "run.json").exists():
        raise DpjaxError(
            f"{run.folder} already holds a run; continue it with `dpjax resume {run.folder}` or "
            "choose another --output"
        )
    if run.audit_secret is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_private(run.folder / "audit.secret", run.audit_secret.hex() + "\n")
    write_json(run.folder / "run.json", {**run.facts, "identifier": run.identifier})


def reopen(folder: str | os.PathLike) -> Run:
    """The run that a folder holds, refused if data, configuration or software changed."""
    path = pathlib.Path(folder)
    saved = read_json(path / "run.json", f"{path} holds no run; start one with `dpjax train`")
    try:
        config = train_config_from_dict(saved["config"])
        described = saved.get("federate")
        federated = None if described is None else federate_config_from_dict(described)
        identifier = saved["identifier"]
    except (TypeError, KeyError) as error:
        raise DpjaxError(f"{path / 'run.json'} is corrupt ({error}); restore the file") from None
    run = dataclasses.replace(open_run(config, path, federated), identifier=identifier)
    refuse_changes(saved, run.facts, path)
    return run


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], where: pathlib.Path) -> None:
    """Names the first fact that differs between a saved run and this one."""
    before, after = _flat(saved), _flat(now)
    for name, value in after.items():
        if before.get(name) != value:
            raise DpjaxError(
                f"{where} cannot be resumed: {name} was {before.get(name)!r} and is now {value!r}; "
                "a resumed run must repeat the recorded releases exactly: restore it, or start a "
                "new run"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_private(path: pathlib.Path, text: str) -> None:
    """Writes a file that only its owner may read."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DpjaxError(f"{path} cannot be written ({error.strerror}); check the folder") from None


def read_json(path: pathlib.Path, missing: str) -> dict[str, Any]:
    """A JSON object from disk, or one line saying what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DpjaxError(missing) from None
    except (OSError, ValueError) as error:
        raise DpjaxError(f"{path} is corrupt ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise DpjaxError(f"{path} is corrupt (not an object); restore the file")
    return value
