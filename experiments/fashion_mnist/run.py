"""Fashion-MNIST by plain DP-SGD at (epsilon 3, delta 1e-5): a small convolutional network on CPU.

    python experiments/fashion_mnist/run.py --preset full     # 60,000 images, three seeds
    python experiments/fashion_mnist/run.py --preset smoke    # 4,000 images, seconds

Hardware, duration, our accuracy and the published ones: README.md. Numbers of the last full run:
results.json. The images come from Debian's package dataset-fashion-mnist, or from the folder that
``--data`` or DPJAX_FASHION_MNIST names.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int

from dpjax.data import ArrayDataset, Images, load_digits, load_fashion_mnist
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.training import TrainState, fit, init_state, train_step
from dpjax.types import PyTree, RandomKey

HERE = pathlib.Path(__file__).resolve().parent
CLASSES = 10
CHANNELS = (16, 64)
GROUPS = 4
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Everything in it is public."""

    preset: Literal["full", "smoke"] = "full"
    """Which defaults the other options start from."""
    dataset: Literal["fashion_mnist", "digits"] = "fashion_mnist"
    """digits: scikit-learn's 8 x 8 digits enlarged to 28 x 28, where the real images are absent."""
    data: str | None = None
    """Folder with the four IDX files; default: DPJAX_FASHION_MNIST, else the Debian package's."""
    num_train: int | None = None
    """Use the first so many training images; default: all."""
    num_validation: int = 0
    """Score on the last so many training images, not on the test set, and do not train on them."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0, 1, 2)
    """One run each."""
    target_epsilon: float = 3.0
    """Nats."""
    target_delta: float = 1e-5
    """Below 1 / number of training images."""
    accountant: Literal["rdp", "pld"] = "rdp"
    """Calibrates the noise; both epsilons are reported. rdp holds under both."""
    noise: bool = True
    """Without noise there is no privacy, only the answer to what the noise costs."""
    expected_batch_size: int = 2048
    """Poisson sampling probability times number of training images."""
    iterations: int = 586
    """Noisy updates."""
    l2_clip_norm: float = 0.1
    """Largest gradient norm of one image."""
    learning_rate: float = 12.0
    """Falls linearly to a tenth of this."""
    momentum: float = 0.9
    """Of SGD, without Nesterov's correction."""
    averaging_decay: float = 0.98
    """Of the running average of the released parameters, which is what gets scored."""
    microbatch_size: int = 64
    """Images differentiated at once; changes speed and rounding only."""
    devices: int = 2
    """CPU devices to shard the batch over; changes speed and rounding only."""
    measure_throughput: bool = True
    """Also time a private step and an ordinary gradient, both on one device."""
    output: str | None = str(HERE / "results.json")
    """JSON file of the results."""

    def __post_init__(self):
        if not self.seeds:
            raise DpjaxError("seeds is empty; give at least one, e.g. --seeds 0")
        if not 0 <= self.averaging_decay < 1:
            raise DpjaxError(
                f"averaging_decay is {self.averaging_decay}; it must be in [0, 1); 0 takes the last"
            )


PRESETS = {
    "full": Config(),
    "smoke": Config(
        preset="smoke",
        num_train=4_000,
        seeds=(0,),
        expected_batch_size=256,
        iterations=50,
        learning_rate=6.0,
        averaging_decay=0.9,
        measure_throughput=False,
        output=None,
    ),
}


class Result(NamedTuple):
    """One seed."""

    seed: int
    accuracy: float  # of the averaged parameters
    last_accuracy: float  # of the last parameters
    seconds: float  # training without compilation and scoring
    images_per_second: float  # expected ones: the realised batch is private, padding no image
    compilations: int  # of the training step, in this run


# --- data -----------------------------------------------------------------------------------------


def load(config: Config) -> tuple[ArrayDataset, Images]:
    """Training set and the images to score on."""
    if config.dataset == "digits":
        train, test = (Images(_enlarged(x.images), x.labels) for x in load_digits())
    else:
        train, test = load_fashion_mnist(config.data)
    if config.num_validation:
        cut = len(train.labels) - config.num_validation
        if cut < 1:
            raise DpjaxError(
                f"num_validation is {config.num_validation} of {len(train.labels)} images; leave "
                "some to train on, e.g. 10000"
            )
        train, test = (
            Images(train.images[:cut], train.labels[:cut]),
            Images(train.images[cut:], train.labels[cut:]),
        )
    kept = slice(config.num_train)
    dataset = ArrayDataset(
        {"image": train.images[kept], "label": train.labels[kept]},
        name=config.dataset,
        unit="image with its label",
    )
    return dataset, test


def _enlarged(images: Float[np.ndarray, "n 8 8 1"]) -> Float[np.ndarray, "n 28 28 1"]:
    """Each pixel becomes 3 x 3, with a border of 2."""
    return np.pad(images.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2), (0, 0)))


# --- model ----------------------------------------------------------------------------------------
# Convolutions are written as patches times a matrix. Under vmap(grad) a convolution primitive turns
# into a grouped one, and inside a scan over microbatches it runs on XLA's slow path on CPU.


@jax.jit
def init_params(key: RandomKey) -> PyTree:
    """27,738 float32 parameters in a dict."""
    first, second, last = jax.random.split(key, 3)

    def weights(key: RandomKey, rows: int, columns: int) -> Array:
        return jax.random.normal(key, (rows, columns)) / np.sqrt(rows).astype(np.float32)

    return {
        "conv1": {"w": weights(first, 8 * 8, CHANNELS[0]), "b": jnp.zeros(CHANNELS[0])},
        "conv2": {
            "w": weights(second, 4 * 4 * CHANNELS[0], CHANNELS[1]),
            "b": jnp.zeros(CHANNELS[1]),
        },
        "dense": {"w": weights(last, 4 * 4 * CHANNELS[1], CLASSES), "b": jnp.zeros(CLASSES)},
    }


def logits(params: PyTree, image: Float[Array, "28 28 1"]) -> Float[Array, "10"]:
    """Scores of the ten classes for one image."""
    # The image's own mean and deviation: a function of one record, so it needs no budget.
    x = (image - jnp.mean(image)) / (jnp.std(image) + 1e-3)
    x = jnp.pad(x, ((3, 3), (3, 3), (0, 0)))
    x = _block(params["conv1"], _pixels_to_channels(x), 4)  # 8 x 8 kernel, stride 2: 13 x 13
    x = _block(params["conv2"], _pixels_to_channels(x[:12, :12]), 2)  # 4 x 4, stride 2: 4 x 4
    return _affine(params["dense"], x.reshape(-1))


def loss_fn(params: PyTree, example: PyTree) -> Float[Array, ""]:
    """Cross-entropy of one labelled image, in nats."""
    return -jax.nn.log_softmax(logits(params, example["image"]))[example["label"]]


def _affine(params: PyTree, x: Array) -> Array:
    out = jnp.dot(x, params["w"])
    return out + jnp.broadcast_to(params["b"], out.shape)


def _block(params: PyTree, x: Float[Array, "h w c"], kernel: int) -> Array:
    """Convolution, 2 x 2 max pooling with stride 1, group normalisation, tanh."""
    x = _affine(params, _patches(x, kernel))
    x = jnp.maximum(x[:-1], x[1:])
    x = jnp.maximum(x[:, :-1], x[:, 1:])
    return jnp.tanh(_group_norm(x))


def _pixels_to_channels(x: Float[Array, "h w c"]) -> Float[Array, "h/2 w/2 4*c"]:
    """2 x 2 pixels become one, so that a convolution with stride 2 becomes one with stride 1."""
    height, width, channels = x.shape
    x = x.reshape(height // 2, 2, width // 2, 2, channels).transpose(0, 2, 1, 3, 4)
    return x.reshape(height // 2, width // 2, 4 * channels)


def _patches(x: Float[Array, "h w c"], kernel: int) -> Array:
    """Each position's kernel x kernel neighbourhood as channels, along one axis after the other."""
    height, width = x.shape[0] - kernel + 1, x.shape[1] - kernel + 1
    x = jnp.concatenate([x[i : i + height] for i in range(kernel)], axis=-1)
    return jnp.concatenate([x[:, i : i + width] for i in range(kernel)], axis=-1)


def _group_norm(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Over one image's positions and a group's channels; nothing learned, no other image read."""
    grouped = x.reshape(*x.shape[:2], GROUPS, -1)
    mean = jnp.mean(grouped, axis=(0, 1, 3), keepdims=True)
    variance = jnp.var(grouped, axis=(0, 1, 3), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)


@jax.jit
def _predict(params: PyTree, images: Float[Array, "n 28 28 1"]) -> Int[Array, " n"]:
    return jnp.argmax(jax.vmap(logits, in_axes=(None, 0))(params, images), axis=-1)


def accuracy(params: PyTree, test: Images) -> float:
    """Share of images whose class is found."""
    correct = 0
    for start in range(0, len(test.labels), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        correct += int(np.sum(np.asarray(_predict(params, test.images[part])) == test.labels[part]))
    return correct / len(test.labels)


# --- training -------------------------------------------------------------------------------------


def make_mechanism(config: Config, population: int) -> DPSGD:
    """Poisson-sampled DP-SGD with the noise that the budget asks for, or with none."""
    return DPSGD(
        l2_clip_norm=config.l2_clip_norm,
        sampling_probability=config.expected_batch_size / population,
        iterations=config.iterations,
        noise_multiplier=None if config.noise else 0.0,
        target_epsilon=config.target_epsilon if config.noise else None,
        target_delta=config.target_delta if config.noise else None,
        population=population,
        normalize_by=float(config.expected_batch_size),
        microbatch_size=config.microbatch_size,
        accountant=config.accountant,
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """SGD with momentum and a linear schedule."""

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        progress = count.astype(jnp.float32) / config.iterations
        return config.learning_rate * (1.0 - 0.9 * progress)

    return optax.sgd(schedule, momentum=config.momentum)


@jax.jit
def _average(average: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def run_seed(
    config: Config,
    seed: int,
    mechanism: DPSGD,
    optimizer: optax.GradientTransformation,
    dataset: ArrayDataset,
    test: Images,
) -> Result:
    """Trains once and scores.

    The average reads released parameters only, so it costs nothing (post-processing). The seed is
    fixed so that the number can be checked; a model to be given away needs a secret key.
    """
    params_key, key = jax.random.split(jax.random.key(seed))
    start = init_state(mechanism, init_params(params_key), optimizer, key)
    average = params = start.params
    began = time.monotonic()
    with _counted_compilations("_train_step") as compilations:
        for state, info in fit(start, mechanism, loss_fn, optimizer, dataset):
            iteration = int(info.iteration)
            # Starts as a plain mean, so that the random initial parameters are forgotten.
            decay = min(config.averaging_decay, iteration / (iteration + 9.0))
            params = state.params
            average = _average(average, params, np.float32(decay))
            if iteration == 1:  # compiled by now
                began = time.monotonic()
            _show_progress(f"seed {seed}: iteration {iteration} of {config.iterations}")
        jax.block_until_ready(average)
    seconds = time.monotonic() - began
    images = config.expected_batch_size * (config.iterations - 1)
    _show_progress("")
    return Result(
        seed,
        accuracy(average, test),
        accuracy(params, test),
        round(seconds, 1),
        round(images / seconds, 1),
        len(compilations),
    )


def run(config: Config) -> dict[str, Any]:
    """The whole experiment; returns (and writes, with ``output``) the results."""
    began = time.monotonic()
    dataset, test = load(config)
    mechanism = make_mechanism(config, len(dataset))
    optimizer = make_optimizer(config)
    epsilons = {name: mechanism.epsilon(config.target_delta, name) for name in ("rdp", "pld")}
    print(
        f"{len(dataset)} images, noise multiplier {mechanism.noise_multiplier:.3f}, at delta "
        f"{config.target_delta:g}: epsilon {epsilons['pld']:.3f} (PLD), {epsilons['rdp']:.3f} (RDP)"
    )
    results = []
    for seed in config.seeds:
        results.append(run_seed(config, seed, mechanism, optimizer, dataset, test))
        print(
            f"seed {seed}: accuracy {results[-1].accuracy:.4f}, "
            f"{results[-1].seconds:.0f} s, {results[-1].images_per_second:.0f} images/s"
        )
    scores = [result.accuracy for result in results]
    kind = "held-out training" if config.num_validation else "test"
    summary = {
        "scored_on": f"{len(test.labels)} {kind} images",
        "mean_accuracy": round(float(np.mean(scores)), 5),
        "min_accuracy": min(scores),
        "runs": [result._asdict() for result in results],
        "epsilon": epsilons if mechanism.is_private else None,
        "delta": config.target_delta,
        "neighboring_relation": mechanism.relation.name.lower(),
        "sampling": mechanism.sampling,
        "sampling_probability": mechanism.sampling_probability,
        "noise_multiplier": mechanism.noise_multiplier,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(init_params(jax.random.key(0)))),
        "one_device_images_per_second": (
            measure_throughput(config, mechanism, optimizer, dataset)
            if config.measure_throughput
            else None
        ),
        # Paths name a machine, not an experiment.
        "config": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("data", "output")
        },
        "hardware": f"{os.cpu_count()} {platform.machine()} cores, {jax.default_backend()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "numpy": np.__version__,
        },
        "seconds": round(time.monotonic() - began, 1),
    }
    print(f"mean accuracy {summary['mean_accuracy']:.4f} on {summary['scored_on']}")
    if config.output is not None:
        path = pathlib.Path(config.output)
        path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


@contextlib.contextmanager
def _counted_compilations(function: str) -> Iterator[list[str]]:
    """Collects one entry per compilation of a function whose name holds ``function``."""
    found: list[str] = []

    def listener(event: str, duration: float, **details: Any) -> None:
        del duration
        name = str(details.get("fun_name", ""))
        if event == "/jax/core/compile/backend_compile_duration" and function in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def _show_progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


# --- speed ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="microbatch_size")
def _plain_gradient(params: PyTree, batch: PyTree, microbatch_size: int) -> PyTree:
    """Ordinary gradient of the summed loss in microbatches: the cost without privacy."""
    chunks = jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch)

    def body(total: PyTree, chunk: PyTree) -> tuple[PyTree, None]:
        def summed(p: PyTree) -> Array:
            return jnp.sum(jax.vmap(loss_fn, in_axes=(None, 0))(p, chunk))

        return jax.tree.map(jnp.add, total, jax.grad(summed)(params)), None

    return jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), chunks)[0]


def measure_throughput(
    config: Config,
    mechanism: DPSGD,
    optimizer: optax.GradientTransformation,
    dataset: ArrayDataset,
    repetitions: int = 5,
) -> dict[str, float]:
    """Images per second of a private step and of ordinary gradients, best of a few.

    The ordinary gradient takes the faster of three microbatch sizes, the private step its own.
    """
    size = -(-config.expected_batch_size // 256) * 256
    batch = jax.device_put(dataset.take(np.arange(size) % len(dataset)))
    state: TrainState = init_state(
        mechanism, init_params(jax.random.key(0)), optimizer, jax.random.key(1)
    )
    nobody = jnp.zeros(size, bool)
    private = functools.partial(
        train_step, mechanism=mechanism, loss_fn=loss_fn, optimizer=optimizer
    )

    def fastest(function: Any, *arguments: Any) -> float:
        jax.block_until_ready(function(*arguments))
        times = []
        for _ in range(repetitions):
            began = time.monotonic()
            jax.block_until_ready(function(*arguments))
            times.append(time.monotonic() - began)
        return size / min(times)

    plain = max(fastest(_plain_gradient, state.params, batch, m) for m in (16, 64, 256))
    clipped = fastest(private, state, batch, nobody)
    return {
        "private": round(clipped, 1),
        "non_private": round(plain, 1),
        "fraction_of_non_private": round(clipped / plain, 3),
    }


def main() -> int:
    """Command line."""
    # The preset chooses the other options' defaults, so it is read first.
    given = [
        a.partition("=")[2] or b
        for a, b in zip(sys.argv, [*sys.argv[1:], ""], strict=True)
        if a.partition("=")[0] == "--preset"
    ]
    try:
        default = PRESETS.get(given[-1] if given else "full", PRESETS["full"])
        config = tyro.cli(Config, default=default, description=(__doc__ or "").splitlines()[0])
        if config.devices > 1:
            jax.config.update("jax_num_cpu_devices", config.devices)
        run(config)
    except DpjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
