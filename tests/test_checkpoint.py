"""Checkpoints: bitwise round trips, nothing silently wrong."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpjax.checkpoint import Checkpointer, _writing, digest, load_params, save_params
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.training import init_state


def state_of(seed, dtype=jnp.float32):
    mechanism = DPSGD(1.0, 0.1, 5, noise_multiplier=1.0)
    params = {"layers": [{"w": jnp.full((3, 2), 0.1, dtype)}, {"w": jnp.ones((2,), dtype)}]}
    return init_state(mechanism, params, optax.adam(0.1), jax.random.key(seed))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise_and_keeps_typed_keys(tmp_path, dtype):
    state = state_of(7, dtype)
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(3, state, {"fact": "一"})
        restored, facts = checkpointer.restore(state_of(8, dtype))
    assert digest(restored) == digest(state) != digest(state_of(8, dtype))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert facts["fact"] == "一" and facts["iteration"] == 3
    assert jnp.issubdtype(restored.sampling_key.dtype, jax.dtypes.prng_key)
    a, b = (jax.random.normal(s.opt_state[0].key, (4,)) for s in (restored, state))
    np.testing.assert_array_equal(a, b)


def test_the_newest_two_are_kept(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpointer:
        for i in range(4):
            checkpointer.save(i, {"w": jnp.full(2, float(i))}, {})
        state, _ = checkpointer.restore({"w": jnp.zeros(2)})
    assert state["w"][0] == 3
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


# Reading harmed files leaves background tasks of the storage library unfinished.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_any_harm_is_one_line_and_the_one_before_still_works(tmp_path, harm):
    like = {"w": jnp.zeros(5000), "b": jnp.zeros(3)}
    with Checkpointer(tmp_path / "c") as checkpointer:
        for i in (1, 2):
            value = jnp.asarray(np.random.default_rng(i).normal(size=5000), jnp.float32)
            checkpointer.save(i, {"w": value, "b": jnp.ones(3) * i}, {})
    newest = tmp_path / "c" / "2"
    files = sorted((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    target = files[-1]
    content = bytearray(target.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 0x10
        target.write_bytes(bytes(content))
    elif harm == "truncate":
        target.write_bytes(bytes(content[: len(content) // 2]))
    else:
        target.unlink()
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(DpjaxError, match="corrupt") as caught:
            checkpointer.restore(like)
        assert "\n" not in str(caught.value) and str(newest) in str(caught.value)
    newest.rename(tmp_path / "moved")
    with Checkpointer(tmp_path / "c") as checkpointer:
        state, _ = checkpointer.restore(like)
    assert state["b"][0] == 1


def test_another_structure_is_named(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)}, {})
        for like, words in (
            ({"v": jnp.ones(2)}, "'v' is in only one"),
            ({"w": jnp.ones(3)}, "expected float32"),
            ({"w": jnp.ones(2, jnp.bfloat16)}, "expected bfloat16"),
        ):
            with pytest.raises(DpjaxError, match=words):
                checkpointer.restore(like)


def test_an_empty_folder_says_how_to_start(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(DpjaxError, match="dpjax train"):
            checkpointer.restore({"w": jnp.ones(2)})


def test_params_alone_round_trip_and_report_harm(tmp_path):
    params = {"w": jnp.arange(3.0)}
    written = save_params(tmp_path / "p", params)
    assert digest(load_params(tmp_path / "p", params)) == written
    with pytest.raises(DpjaxError, match="does not exist"):
        load_params(tmp_path / "elsewhere", params)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x: No space left on device")],
)
def test_a_full_disk_is_said_in_one_line(tmp_path, error):
    with pytest.raises(DpjaxError, match="the disk is full") as caught, _writing(tmp_path):
        raise error
    assert "\n" not in str(caught.value)


def test_too_little_room_is_noticed_before_writing(tmp_path, monkeypatch):
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(1000)}, {})
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5000))
        with pytest.raises(DpjaxError, match="the disk is full"):
            checkpointer.save(2, {"w": jnp.ones(1000)}, {})
        monkeypatch.undo()
        assert checkpointer.latest() == 1
        checkpointer.save(2, {"w": jnp.ones(1000)}, {})
        assert checkpointer.latest() == 2
