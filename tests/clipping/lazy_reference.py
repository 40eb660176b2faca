"""What the models of the lazy tests share: how they are made, and their float64 reference."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.clipping import clipped_grad

BATCH = 5
MODELS: dict[str, Callable[[], "Model"]] = {}


@dataclasses.dataclass(frozen=True)
class Model:
    """A one-example loss with parameters and a batch.

    Attributes:
      loss_fn: every example has a float leaf "weight" that multiplies its whole loss.
      rtol: allowed error of sums and norms, relative to the larger of leaf and clip norm.
      strict: whether it runs under strict promotion; frameworks do not always.
      has_aux: whether the loss returns ``(loss, aux)``.
      has_gradient: False where every example's gradient is zero.
      reference_loss: the loss for the float64 reference, if its own has float32 written into it.
    """

    loss_fn: Callable
    params: Any
    batch: Any
    rtol: float = 1e-5
    strict: bool = True
    has_aux: bool = False
    has_gradient: bool = True
    reference_loss: Callable | None = None

    def arithmetic(self, strict: bool = True) -> contextlib.AbstractContextManager:
        """The promotion rules that the model runs under."""
        if self.strict and strict:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        return stack


def quick_jit(fn: Callable) -> Callable:
    """Compiled without optimising the machine code, which is most of the time to compile."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


class Draw:
    """Random arrays of a model, the same in every run."""

    def __init__(self, name: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __call__(self, *shape: int, scale: float | None = None) -> jax.Array:
        """N(0, scale^2); without a scale, one that keeps the size of what it multiplies."""
        size = float(1 / np.sqrt(max(1, *shape[:-1], 1))) if scale is None else scale
        return jax.device_put(np.float32(size * self.rng.normal(size=shape)))

    def data(self, *shape: int) -> jax.Array:
        """Inputs of a batch."""
        return self(BATCH, *shape, scale=1.0)

    def ints(self, high: int, *shape: int, low: int = 0) -> jax.Array:
        """Integers of a batch, with repeats."""
        return jax.device_put(np.int32(self.rng.integers(low, high, (BATCH, *shape))))


def model(build: Callable[[Draw], Model]) -> Callable[[Draw], Model]:
    """Registers a builder under its function's name."""
    name = build.__name__
    assert getattr(MODELS.get(name), "line", build.__code__.co_firstlineno) == (
        build.__code__.co_firstlineno
    ), f"two models are called {name}"

    @functools.cache
    def built() -> Model:
        return build(Draw(name))

    built.line = build.__code__.co_firstlineno  # pyright: ignore[reportAttributeAccessIssue]
    MODELS[name] = built
    return build


def weighted(inner: Callable, params: Any, batch: dict, **options: Any) -> Model:
    """The model whose loss is ``inner`` times the example's weight; weights differ widely."""

    def of(fn):
        def loss_fn(params, example):
            out = fn(params, example)
            value, *aux = out if options.get("has_aux") else (out,)
            loss = value * example["weight"].astype(value.dtype)
            return (loss, *aux) if aux else loss

        return loss_fn

    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    assert sizes == {BATCH}, sizes
    weight = jax.device_put(np.float32([0.5, 30.0, 0.02, 4.0, 0.3]))
    if options.get("reference_loss"):
        options["reference_loss"] = of(options["reference_loss"])
    return Model(of(inner), params, {**batch, "weight": weight}, **options)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Gradients of each example, one at a time, in float64 numpy."""

    grads: Any  # leaves float64[batch, ...]
    norms: np.ndarray
    losses: np.ndarray
    aux: Any

    def clip_norm(self) -> float:
        """A clip norm that some examples exceed and some do not."""
        if not self.norms.any():
            return 1.0
        middle = len(self.norms) // 2
        between = float(np.sqrt(np.prod(np.sort(self.norms)[middle : middle + 2])))
        assert self.norms.min() < between < self.norms.max(), self.norms
        return between

    def clipped_sum(self, clip: float, keep: np.ndarray | None = None) -> Any:
        """Sum of clipped gradients of the examples to keep."""
        factor = np.minimum(1.0, clip / np.maximum(self.norms, 1e-300))
        if keep is not None:
            factor = factor * keep
        return jax.tree.map(lambda g: np.tensordot(factor, g, 1), self.grads)


def on_host(tree: Any) -> Any:
    """The leaves as numpy, where indexing compiles nothing; keys as they are."""

    def host(x):
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)

    return jax.tree.map(host, tree)


def to_float64(tree: Any) -> Any:
    """Float leaves as float64; integers and keys as they are. For use under enable_x64."""

    def wide(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.dtype.kind in "iub":
            return x
        return jax.device_put(np.asarray(x, np.float64))  # asarray would compile a copy

    return jax.tree.map(wide, tree)


def float64_reference(model: Model) -> Reference:
    """A loop over the examples: `jax.grad` of the one-example loss in float64."""
    size = len(jax.tree.leaves(model.batch)[0])
    batch = on_host(model.batch)
    examples = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(size)]
    loss_fn = model.reference_loss or model.loss_fn
    grads, losses, auxs = [], [], []
    with jax.enable_x64(True), model.arithmetic(strict=model.reference_loss is None):
        params = to_float64(model.params)
        one = quick_jit(jax.value_and_grad(loss_fn, has_aux=model.has_aux))
        for example in examples:
            value, grad = one(params, to_float64(example))
            loss, aux = value if model.has_aux else (value, None)
            grads.append(jax.tree.map(lambda x: np.asarray(x, np.float64), grad))
            losses.append(float(loss))
            auxs.append(jax.tree.map(np.asarray, aux))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    squares = sum((g.reshape(size, -1) ** 2).sum(1) for g in jax.tree.leaves(stacked))
    aux = jax.tree.map(lambda *leaves: np.stack(leaves), *auxs)
    return Reference(stacked, np.sqrt(squares), np.array(losses), aux)


@functools.cache
def reference(name: str) -> Reference:
    """The reference of a registered model."""
    return float64_reference(MODELS[name]())


@functools.cache
def compiled(name: str, method: Any) -> Callable:
    """``(params, batch, is_padding_example) -> (sum, info)``, compiled once for all tests."""
    built = MODELS[name]()
    grad_fn = clipped_grad(
        built.loss_fn, reference(name).clip_norm(), method=method, has_aux=built.has_aux
    )

    @quick_jit
    def run(params, batch, is_padding_example):
        return grad_fn(params, batch, is_padding_example)

    def within(*args):
        with built.arithmetic():
            return run(*args)

    return within


def assert_close(found: Any, expected: Any, clip: float, rtol: float) -> None:
    """Each leaf within ``rtol`` of the larger of its norm and the clip norm."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, f), e in pairs:
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        assert f.shape == e.shape, f"{jax.tree_util.keystr(path)}: {f.shape} for {e.shape}"
        error, scale = np.linalg.norm(f - e), max(np.linalg.norm(e), clip)
        assert error <= rtol * scale, (
            f"{jax.tree_util.keystr(path)}: off by {error / scale:.1e} of {scale:.3g}"
        )


def global_norm(tree: Any) -> float:
    """L2 norm of a whole pytree, in float64."""
    squares = [np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(squares)))
