"""What a training run is asked to do: one frozen configuration, and the parts made from it."""

import dataclasses
import secrets
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpjax import accounting
from dpjax.adaptive import AdaptiveClipping
from dpjax.correlated_noise import CorrelatedNoise
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD, Sampling
from dpjax.models import LoRA, Tuning, is_pretrained_source

PRESETS = ("nano", "mini", "small", "gpt2")
# Peak learning rates that trained well under noise; see experiments/dp_lora_chitchat.
_LEARNING_RATES = {"full": 2e-3, "lora": 2e-3, "last_layers": 5e-4, "bias": 5e-3}
_PRETRAINED_FULL = 2e-4


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

    label_field: str | None = None
    """Field with the label: the model then learns to write records of a label (see labels)."""
    labels: tuple[str, ...] = ()
    """Every label there may be. You name them: a list read from the records would be a release."""
    prompt: str = "{label}: "
    """What stands in front of a labelled record and is not predicted."""
    unit: Literal["record", "user"] = "record"
    """What one gradient, and so the guarantee, is for: one record, or all records of one person
    (at most --max-examples-per-user rows of them)."""
    pack: bool = False
    """With --unit user: join a person's records into full rows instead of padding each."""

    model: str = "nano"
    """From scratch: "nano" (0.7M parameters), "mini" (5M), "small" (30M) or "gpt2" (124M shape).
    Pretrained: "smollm2" (135M), a Hugging Face folder or hub id, a .gguf file, a model folder."""
    tuning: Literal["auto"] | Tuning = "auto"
    """What is trained: all ("full"), low-rank adapters ("lora"), the last layers, or biases.
    "auto" is lora for a pretrained model, else full."""
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    """Low-rank adapters, for --tuning lora."""
    last_layers: int = 2
    """How many, for --tuning last_layers."""
    remat: bool = False
    """Recompute layers in the backward pass: less memory, a third more time."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, norms and noise stay float32."""

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
    correlated_noise: Literal["banded", "tree", "blt"] | None = None
    """Noise that later iterations partly take back; with --sampling cyclic, which nobody has to
    keep secret."""
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
    learning_rate: float | None = None
    """Peak; warms up over the first tenth, then falls to a tenth by a cosine. Default: by --tuning,
    e.g. 2e-3."""
    weight_decay: float = 0.0
    """For adam."""

    audit_canaries: int = 0
    """Random-token canaries of which fair coins put about half among the records, so that `dpjax
    audit run` can bound epsilon from below. 1000 can show at most 5.78; they cost some utility."""

    seed: int | None = None
    """Fixes all randomness, for research: a known seed means no guarantee in the real world.
    Default: fresh from the operating system, kept secret."""
    checkpoint_every: int = 25
    """Iterations between checkpoints."""
    intended_use: str = "not stated"
    """One line for the privacy card."""


def train_config_from_dict(described: dict[str, Any]) -> TrainConfig:
    """Reverses ``dataclasses.asdict``, also after JSON.

    Raises:
      TypeError: unknown or missing fields.

    Example:
      >>> config = TrainConfig(data="notes.jsonl", lora=LoRA(4))
      >>> train_config_from_dict(dataclasses.asdict(config)) == config
      True
    """
    fields = dict(described)
    fields["lora"] = LoRA(**fields["lora"])
    fields["labels"] = tuple(fields["labels"])
    return TrainConfig(**fields)


def tuning_of(config: TrainConfig) -> Tuning:
    """What is trained, with "auto" decided.

    Example:
      >>> tuning_of(TrainConfig(data="x", model="smollm2")), tuning_of(TrainConfig(data="x"))
      ('lora', 'full')
    """
    if config.tuning != "auto":
        return config.tuning
    return "lora" if is_pretrained(config) else "full"


def is_pretrained(config: TrainConfig) -> bool:
    """Whether the model comes from elsewhere, in another format than our model folders."""
    return config.model not in PRESETS and is_pretrained_source(config.model)


def peak_learning_rate(config: TrainConfig) -> float:
    """The configured one, or the default for what is trained."""
    if config.learning_rate is not None:
        return config.learning_rate
    tuning = tuning_of(config)
    return (
        _PRETRAINED_FULL if tuning == "full" and is_pretrained(config) else _LEARNING_RATES[tuning]
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optax optimizer a configuration asks for.

    Example:
      >>> callable(make_optimizer(TrainConfig(data="notes.jsonl")).update)
      True
    """
    peak = peak_learning_rate(config)
    if not peak > 0:
        raise DpjaxError(f"learning_rate is {peak}; it must be positive, e.g. 2e-3")
    warmup = max(1, config.iterations // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.1 * peak,
        peak,
        warmup,
        max(config.iterations, warmup + 1),
        0.1 * peak,
    )
    if config.optimizer == "sgd":
        return optax.sgd(schedule, momentum=0.9)
    return optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=config.weight_decay)


def make_mechanism(
    config: TrainConfig, population: int, expected_population: float | None = None
) -> DPSGD:
    """The mechanism a configuration asks for, over ``population`` training examples.

    Args:
      expected_population: what the sampling probability is reckoned with, where coins decide on
        some of the examples: it must not depend on them. Default: ``population``.

    Example:
      >>> mechanism = make_mechanism(TrainConfig(data="notes.jsonl"), population=10_000)
      >>> print(mechanism.sampling_probability, mechanism.target_delta)
      0.0256 3.9e-05
    """
    if config.expected_batch_size < 1:
        raise DpjaxError(f"expected_batch_size is {config.expected_batch_size}; use at least 1")
    nominal = population if expected_population is None else expected_population
    batch = min(config.expected_batch_size, int(nominal))
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
        sampling_probability=batch / nominal,
        iterations=config.iterations,
        noise_multiplier=config.noise_multiplier,
        target_epsilon=config.target_epsilon if by_target else None,
        target_delta=delta if by_target else None,
        sampling=config.sampling,
        population=population,
        truncated_batch_size=config.truncated_batch_size,
        correlated_noise=(
            None if config.correlated_noise is None else CorrelatedNoise(config.correlated_noise)
        ),
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
