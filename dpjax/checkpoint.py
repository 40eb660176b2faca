"""Checkpoints of a whole run as one atomic unit, and model folders fit for release.

A checkpoint holds parameters, optimizer and noise state, the sampler's key and position, and the
ledger's head. It is secret: whoever has its keys can subtract the noise. A model folder holds
parameters alone and may be shared under the run's guarantee.
"""

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.errors import DpjaxError
from dpjax.types import PyTree

_STATE, _FACTS = "state", "facts"


def _orbax() -> Any:
    # Imported on use: it takes seconds, and `import dpjax` must not.
    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.ERROR)
    return orbax.checkpoint


def _flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves by path. Typed keys become their uint32 data, which Orbax can store."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = jax.random.key_data(leaf) if is_key else leaf
        # Names travel as file names: keep to letters, digits and a few signs.
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        flat[name] = np.asarray(value)
    return flat


def _unflatten(like: PyTree, flat: dict[str, np.ndarray], where: pathlib.Path) -> PyTree:
    """The inverse of `_flatten`, with the structure, shapes and dtypes of ``like`` enforced."""
    expected = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        stored = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
        expected[jax.tree_util.keystr(path, simple=True, separator=".")] = stored
    if set(expected) != set(flat):
        odd = sorted(set(expected) ^ set(flat))
        raise DpjaxError(
            f"checkpoint {where} does not fit this run: {odd[0]!r} is in only one of the two; "
            "resume with the model and optimizer it was saved with"
        )
    for name, value in expected.items():
        found = flat[name]
        if (tuple(value.shape), value.dtype) != (found.shape, found.dtype):
            raise DpjaxError(
                f"checkpoint {where} does not fit this run: {name!r} is {found.dtype}"
                f"{list(found.shape)}, expected {value.dtype}{list(value.shape)}"
            )
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, leaf in paths:
        value = flat[jax.tree_util.keystr(path, simple=True, separator=".")]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaves.append(jax.random.wrap_key_data(jnp.asarray(value)))
        else:
            leaves.append(jnp.asarray(value))
    return jax.tree.unflatten(treedef, leaves)


def digest(tree: PyTree) -> str:
    """Hex sha256 over names, dtypes, shapes and bytes: equal exactly for bitwise equal trees.

    Example:
      >>> import jax.numpy as jnp
      >>> digest({"w": jnp.zeros(2)}) == digest({"w": -jnp.zeros(2)})  # 0.0 and -0.0 differ
      False
    """
    return _digest(_flatten(tree))


def _digest(flat: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(flat):
        value = flat[name]
        total.update(f"{name}:{value.dtype}:{value.shape}:".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def _writing(path: pathlib.Path, flat: dict[str, np.ndarray] | None = None) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into one line, before writing where it can."""
    # Orbax writes each array twice before it merges them.
    needed = 0 if flat is None else (1 << 19) + int(2.5 * sum(v.nbytes for v in flat.values()))
    try:
        if shutil.disk_usage(_existing_parent(path)).free < needed:
            raise OSError(errno.ENOSPC, "No space left on device")
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        if not full and not isinstance(error, OSError):
            full = shutil.disk_usage(_existing_parent(path)).free < 1 << 20
            if not full:
                raise
        reason = "the disk is full" if full else text[:200]
        raise DpjaxError(
            f"{path} cannot be written ({reason}); the last complete checkpoint is intact: make "
            "room and resume"
        ) from error


def _existing_parent(path: pathlib.Path) -> pathlib.Path:
    while not path.exists():
        path = path.parent
    return path


class Checkpointer:
    """Saves and restores one run's states under ``folder``; keeps the newest two.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> folder = tempfile.TemporaryDirectory()
      >>> with Checkpointer(folder.name) as checkpointer:
      ...     checkpointer.save(3, {"w": jnp.ones(2)}, {"ledger_head": "00"})
      ...     state, facts = checkpointer.restore({"w": jnp.zeros(2)})
      >>> print(state["w"], facts["ledger_head"])
      [1. 1.] 00
      >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder).absolute()
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)  # it holds the noise key
            ocp = _orbax()
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2,
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=True,
                    save_root_metadata=False,
                ),
                item_names=(_STATE, _FACTS),
            )

    def save(self, iteration: int, state: PyTree, facts: dict[str, Any]) -> None:
        """Writes one checkpoint; it appears whole, by a rename, or not at all.

        Args:
          iteration: its name; a later save of the same iteration is skipped.
          state: any pytree of arrays and typed keys.
          facts: JSON-compatible facts to compare on resume (hashes, ledger head).
        """
        if iteration in self._manager.all_steps():
            return
        args = _orbax().args
        flat = _flatten(state)
        facts = {**facts, "iteration": iteration, "state_sha256": _digest(flat)}
        items = {_STATE: args.StandardSave(flat), _FACTS: args.JsonSave(facts)}
        try:
            with _writing(self.folder, flat):
                self._manager.save(iteration, args=args.Composite(**items))
                self._manager.wait_until_finished()
        except DpjaxError:
            # What was begun is no use, and the room it takes may be what the resume needs.
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def latest(self) -> int | None:
        """Iteration of the newest complete checkpoint."""
        return self._manager.latest_step()

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Newest state, bit for bit as saved, and its facts.

        Args:
          like: pytree of the same structure (arrays or ShapeDtypeStructs).

        Raises:
          DpjaxError: no checkpoint, unreadable or altered content, another structure.
        """
        iteration = self.latest()
        if iteration is None:
            raise DpjaxError(f"{self.folder} holds no checkpoint; start the run with `dpjax train`")
        where = self.folder / str(iteration)
        args = _orbax().args
        try:
            restored = self._manager.restore(
                iteration,
                args=args.Composite(
                    **{
                        _STATE: args.StandardRestore(),
                        _FACTS: args.JsonRestore(),
                    }
                ),
            )
            flat = {name: np.asarray(value) for name, value in restored[_STATE].items()}
            facts = dict(restored[_FACTS])
            intact = _digest(flat) == facts["state_sha256"]
        except Exception as error:
            raise _corrupt(where, " ".join(str(error).split())[:160]) from error
        if not intact:
            raise _corrupt(where, "its content does not match its sha256")
        return _unflatten(like, flat, where), facts

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _corrupt(where: pathlib.Path, why: str) -> DpjaxError:
    return DpjaxError(
        f"checkpoint {where} is corrupt ({why}); move that folder away to resume from the one "
        "before it"
    )


def save_params(folder: str | os.PathLike, params: PyTree) -> str:
    """Writes parameters alone, for release; returns their sha256.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> folder = tempfile.TemporaryDirectory()
      >>> saved = save_params(f"{folder.name}/params", {"w": jnp.ones(2)})
      >>> restored = load_params(f"{folder.name}/params", {"w": jnp.zeros(2)})
      >>> print(restored["w"], digest(restored) == saved)
      [1. 1.] True
      >>> folder.cleanup()
    """
    path = pathlib.Path(folder).absolute()
    flat = _flatten(params)
    with _writing(path, flat), _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(path, flat, force=True)
    return _digest(flat)


def load_params(folder: str | os.PathLike, like: PyTree) -> PyTree:
    """Reads what `save_params` wrote, with the structure, shapes and dtypes of ``like``."""
    path = pathlib.Path(folder).absolute()
    if not path.exists():
        raise DpjaxError(f"{path} does not exist; give the folder that a run wrote its model to")
    try:
        with _orbax().StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path)
        flat = {name: np.asarray(value) for name, value in restored.items()}
    except Exception as error:
        raise DpjaxError(
            f"parameters {path} are corrupt ({' '.join(str(error).split())[:160]}); restore the "
            "folder or export the model again"
        ) from error
    return _unflatten(like, flat, path)
