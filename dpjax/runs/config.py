"""A training run on disk: one folder with its plan, ledger, checkpoints, model, card and report.

run.json           the configuration and facts to compare on resume (public)
ledger.jsonl       every release, hash-chained (public)
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
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import accounting
from dpjax.adaptive import AdaptiveClipping
from dpjax.artifact import Model, load_model
from dpjax.data import (
    Dataset,
    Record,
    Tokenizer,
    byte_tokenizer,
    chitchat,
    dataset_from_records,
    load_tokenizer,
    records_from,
    shakespeare,
    train_bpe,
)
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD, Sampling
from dpjax.models import decoder_config, init_params
from dpjax.report.files import write_whole

_PRESETS = ("nano", "mini", "small", "gpt2")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a language model on private records, with a proven (epsilon, delta)."""

    data: str
    """Private records: a jsonl, json, csv, txt or parquet file or folder, a Hugging Face hub id, or
    a bundled source (chitchat, shakespeare)."""
    output: str = "runs/train"
    """Run folder; must not hold another run."""

    text_field: str | None = None
    """Field with the text (default: "text" or the only field)."""
    user_field: str | None = None
    """Field with the person's id (default: every record is its own person)."""
    sequence_length: int = 64
    """Tokens per record; longer records are cut, so one record stays one example."""
    tokenizer: str = "auto"
    """"bytes"; "shakespeare" (BPE trained on public plays); a tokenizer.json; "auto" is the start
    model's own, else bytes."""
    held_out: float = 0.1
    """Share of the people kept for evaluation."""
    held_out_data: str | None = None
    """Instead of that share: records of their own, from a source like --data."""
    max_examples_per_user: int | None = None
    """Bound on one person's records; more are dropped."""

    model: str = "nano"
    """"nano" (0.7M parameters), "mini" (5M), "small" (30M) or "gpt2" (124M shape) from scratch, or
    a model folder to start from."""

    target_epsilon: float | None = 8.0
    """Privacy budget in nats; None with --noise-multiplier."""
    target_delta: float | None = None
    """Failure probability (default: n^-1.1, rounded down)."""
    noise_multiplier: float | None = None
    """Instead of a budget: noise stddev / sensitivity; 0 trains without privacy."""
    l2_clip_norm: float = 1.0
    """Largest L2 norm of one record's gradient."""
    clip_groups: Literal["per_leaf", "per_layer"] | None = None
    """Clip each parameter, or each layer, to its share of the norm (default: all together)."""
    stability_constant: float | None = None
    """Normalise gradients by their norm plus this, e.g. 0.01, instead of clipping them."""
    adaptive_quantile: float | None = None
    """Let the clip norm follow this quantile of the norms, e.g. 0.5, for 1% of the budget."""
    sampling: Sampling = "poisson"
    """How batches are drawn; each way has its own accounting."""
    truncated_batch_size: int | None = None
    """Cap for truncated_poisson sampling."""
    accountant: accounting.Accountant = "rdp"
    """Accountant that calibrates the noise; reports state both."""
    ledger: str | None = None
    """Ledger file (default: in the run folder). Runs on the same data that share one, such as
    hyper-parameter trials, are added up, and the budget holds for all together."""

    iterations: int = 200
    """Noisy updates."""
    expected_batch_size: int = 256
    """Records per update, on average."""
    microbatch_size: int = 16
    """Records differentiated at once; memory follows this."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """optax optimizer behind the noise."""
    learning_rate: float = 2e-3
    """Peak; warms up over the first tenth, then falls to a tenth by a cosine."""
    weight_decay: float = 0.0
    """For adam."""

    seed: int | None = None
    """Fixes all randomness, for research: a known seed means no guarantee in the real world.
    Default: fresh from the operating system, kept secret."""
    checkpoint_every: int = 25
    """Iterations between checkpoints."""
    intended_use: str = "not stated"
    """One line for the privacy card."""


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optax optimizer a configuration asks for.

    Example:
      >>> callable(make_optimizer(TrainConfig(data="notes.jsonl")).update)
      True
    """
    if not config.learning_rate > 0:
        raise DpjaxError(f"learning_rate is {config.learning_rate}; it must be positive, e.g. 2e-3")
    warmup = max(1, config.iterations // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.1 * config.learning_rate,
        config.learning_rate,
        warmup,
        max(config.iterations, warmup + 1),
        0.1 * config.learning_rate,
    )
    if config.optimizer == "sgd":
        return optax.sgd(schedule, momentum=0.9)
    return optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=config.weight_decay)


def make_mechanism(config: TrainConfig, population: int) -> DPSGD:
    """The mechanism a configuration asks for, over ``population`` training examples.

    Example:
      >>> mechanism = make_mechanism(TrainConfig(data="notes.jsonl"), population=10_000)
      >>> print(mechanism.sampling_probability, mechanism.target_delta)
      0.0256 3.9e-05
    """
    if config.expected_batch_size < 1:
        raise DpjaxError(f"expected_batch_size is {config.expected_batch_size}; use at least 1")
    batch = min(config.expected_batch_size, population)
    private = config.noise_multiplier != 0
    by_target = config.noise_multiplier is None
    if by_target and config.target_epsilon is None:
        raise DpjaxError(
            "target_epsilon and noise_multiplier are both None; give one of them "
            "(--noise-multiplier 0 trains without privacy)"
        )
    delta = default_delta(population) if config.target_delta is None else config.target_delta
    if private:
        accounting.check_delta(delta, population)
    return DPSGD(
        l2_clip_norm=config.l2_clip_norm,
        sampling_probability=batch / population,
        iterations=config.iterations,
        noise_multiplier=config.noise_multiplier,
        target_epsilon=config.target_epsilon if by_target else None,
        target_delta=delta if by_target else None,
        sampling=config.sampling,
        population=population,
        truncated_batch_size=config.truncated_batch_size,
        normalize_by=float(batch),
        microbatch_size=min(config.microbatch_size, batch),
        accountant=config.accountant,
        clip_groups=config.clip_groups,
        stability_constant=config.stability_constant,
        adaptive_clipping=(
            None if config.adaptive_quantile is None else AdaptiveClipping(config.adaptive_quantile)
        ),
    )


def default_delta(population: int) -> float:
    """n^-1.1 with two digits, rounded down.

    Example:
      >>> default_delta(10_000)
      3.9e-05
    """
    exact = population**-1.1
    exponent = int(np.floor(np.log10(exact)))
    return float(f"{np.floor(exact / 10**exponent * 10) / 10}e{exponent}")


def public_bpe(vocabulary_size: int = 1024) -> Tokenizer:
    """Byte-level BPE trained on the bundled Shakespeare plays, which are public."""
    texts = [record.text for record in shakespeare()]
    return train_bpe(texts, vocabulary_size, tokenizer_corpus="public")


def public_plays() -> list[Record]:
    """Shakespeare in records of about 64 tokens: consecutive speeches of a play, joined.

    Example:
      >>> records = public_plays()
      >>> len(records) > 10_000, len(records[0].text) > 200
      (True, True)
    """
    joined: list[Record] = []
    current, current_play = "", ""
    for speech in shakespeare():
        play = (speech.user or "").partition("/")[0]
        if current and (play != current_play or len(current) > 230):
            joined.append(Record(current, current_play))
            current = ""
        current_play = play
        current += ("\n" if current else "") + speech.text
    return [*joined, Record(current, current_play)]


_BUNDLED = {"chitchat": chitchat, "shakespeare": public_plays}


def read_records(config: TrainConfig, source: str) -> list[Record]:
    """Records of a file, folder, hub id or bundled source."""
    if source in _BUNDLED:
        return _BUNDLED[source]()
    return records_from(source, config.text_field, config.user_field)


def starting_model(config: TrainConfig, key: jax.Array) -> Model:
    """The model before training: fresh parameters of a preset, or a model folder's."""
    chosen = config.tokenizer
    if config.model not in _PRESETS:
        if not pathlib.Path(config.model).exists():
            raise DpjaxError(
                f"model {config.model!r} is neither a preset ({', '.join(_PRESETS)}) nor a folder"
            )
        start = load_model(config.model)
        if chosen != "auto":
            raise DpjaxError(
                f"tokenizer is {chosen!r}, but {config.model} brings its own; leave it at 'auto'"
            )
        return start
    if chosen in ("auto", "bytes"):
        tokenizer = byte_tokenizer()
    elif chosen == "shakespeare":
        tokenizer = public_bpe()
    else:
        tokenizer = load_tokenizer(chosen)
    shape = decoder_config(config.model, tokenizer.vocabulary_size)  # type: ignore[arg-type]
    return Model(shape, init_params(shape, key), tokenizer)


def make_datasets(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Dataset, Dataset]:
    """Training and held-out examples; nobody is in both (with ``held_out``)."""

    def read(source: str) -> Dataset:
        records = read_records(config, source)
        name = pathlib.Path(source).name
        return dataset_from_records(records, tokenizer, config.sequence_length, name=name)

    training = read(config.data)
    if config.held_out_data is not None:
        held_out = read(config.held_out_data)
    elif 0 < config.held_out < 1:
        # The split depends on public things alone, so it is the same for every trial.
        training, held_out = training.split(config.held_out, seed=0)
    else:
        raise DpjaxError(f"held_out is {config.held_out}; it must be a share in (0, 1), e.g. 0.1")
    if config.max_examples_per_user is not None:
        training = training.bound_contributions(config.max_examples_per_user, seed=0)
    for name, part in (("training", training), ("held-out", held_out)):
        if len(part) == 0:
            raise DpjaxError(
                f"the {name} part of {config.data} has no records; give more records or another "
                "--held-out share"
            )
    return training, held_out


def fresh_key(seed: int | None) -> jax.Array:
    """A key from the seed, or from the operating system's entropy.

    Example:
      >>> bool((jax.random.key_data(fresh_key(None)) != jax.random.key_data(fresh_key(None))).any())
      True
    """
    if seed is not None:
        return jax.random.key(seed)
    words = np.frombuffer(secrets.token_bytes(8), np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that one training run needs, made by `open_run`."""

    folder: pathlib.Path
    config: TrainConfig
    start: Model
    mechanism: DPSGD
    optimizer: optax.GradientTransformation
    training: Dataset
    held_out: Dataset
    facts: dict[str, Any]
    identifier: str

    @property
    def config_sha256(self) -> str:
        """Of the configuration, without where its output goes."""
        public = {k: v for k, v in self.facts["config"].items() if k != "output"}
        return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()

    @property
    def start_is_preset(self) -> bool:
        return self.config.model in _PRESETS

    @property
    def delta(self) -> float:
        """The delta that this run's epsilon is stated at."""
        stated = self.config.target_delta
        return default_delta(len(self.training)) if stated is None else stated

    @property
    def ledger_path(self) -> pathlib.Path:
        return pathlib.Path(self.config.ledger or self.folder / "ledger.jsonl")


def _facts(config: TrainConfig, start: Model, training: Dataset) -> dict[str, Any]:
    """What a resumed run must find unchanged; nothing in it depends on noise or keys."""
    return {
        "config": dataclasses.asdict(config),
        "data_sha256": training.fingerprint(),
        "tokenizer_sha256": start.tokenizer.fingerprint(),
        "versions": {name: importlib.metadata.version(name) for name in ("dpjax", "jax", "optax")},
        "platform": jax.default_backend(),
    }


def open_run(config: TrainConfig, folder: pathlib.Path) -> Run:
    """Reads the data, makes the model and calibrates the noise; writes nothing."""
    if config.checkpoint_every < 1:
        raise DpjaxError(f"checkpoint_every is {config.checkpoint_every}; use at least 1")
    key = jax.random.fold_in(fresh_key(0 if config.seed is None else config.seed), 1)
    start = starting_model(config, key)
    training, held_out = make_datasets(config, start.tokenizer)
    training.validate(start.config.vocabulary_size)
    held_out.validate(start.config.vocabulary_size)
    return Run(
        folder,
        config,
        start,
        make_mechanism(config, len(training)),
        make_optimizer(config),
        training,
        held_out,
        _facts(config, start, training),
        secrets.token_hex(8),
    )


def create(run: Run) -> None:
    """Claims the run folder and writes the plan."""
    if (run.folder / "run.json").exists():
        raise DpjaxError(
            f"{run.folder} already holds a run; continue it with `dpjax resume {run.folder}` or "
            "choose another --output"
        )
    write_json(run.folder / "run.json", {**run.facts, "identifier": run.identifier})


def reopen(folder: str | os.PathLike) -> Run:
    """The run that a folder holds, refused if data, configuration or software changed."""
    path = pathlib.Path(folder)
    saved = read_json(path / "run.json", f"{path} holds no run; start one with `dpjax train`")
    try:
        config = TrainConfig(**saved["config"])
        identifier = saved["identifier"]
    except (TypeError, KeyError) as error:
        raise DpjaxError(f"{path / 'run.json'} is corrupt ({error}); restore the file") from None
    run = dataclasses.replace(open_run(config, path), identifier=identifier)
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
