"""Strict arithmetic, no network, and a compilation cache that all tests of a session share."""

import gc
import os
import pathlib

import pytest

# Before JAX starts, and for the processes that tests start. Many tests compile the same step.
_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of a test's time is compilation. Unoptimised machine code, in one piece, from the older
# emitters takes a fifth of it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)

import jax  # noqa: E402


@pytest.fixture(autouse=True)
def strict_arithmetic():
    """A forgotten axis or a silently widened dtype is an error, not a wrong number."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_code():
    """Each compiled function keeps memory maps, of which Linux gives a process 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def overfit():
    """``overfit(config, texts, length, steps)``: a tiny decoder that knows texts by heart."""

    import jax.numpy as jnp
    import numpy as np
    import optax

    from dpjax.data import Record, byte_tokenizer, dataset_from_records
    from dpjax.models import init_params, language_model_loss

    def train(config, texts, length, steps, seed=0):
        data = dataset_from_records([Record(text) for text in texts], byte_tokenizer(), length)
        batch = jax.tree.map(jnp.asarray, data.take(np.arange(len(data))))
        loss, optimizer = language_model_loss(config), optax.adam(1e-2)

        def step(carry, _):
            params, state = carry
            grad = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, batch)))(params)
            updates, state = optimizer.update(grad, state)
            return (optax.apply_updates(params, updates), state), None

        start = init_params(config, jax.random.key(seed))
        # Optax's Adam multiplies by Python powers of an int32 count.
        with jax.numpy_dtype_promotion("standard"):
            run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, steps)[0][0])
            return run(start)

    return train
