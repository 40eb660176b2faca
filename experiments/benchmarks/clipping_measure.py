"""Compiled steps for clipping.py, what XLA says about them, and their times."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clipping_workloads import Workload

from dpjax.clipping import clipped_grad
from dpjax.types import PyTree

CLIP_NORM = 1.0
HAS_JAX_PRIVACY = importlib.util.find_spec("jax_privacy") is not None


@dataclasses.dataclass
class Row:
    """One method on one workload; without ``call`` there is only the note."""

    method: str
    note: str = ""
    call: Callable[[], tuple[float, float]] | None = None  # one step: (CPU seconds, wall seconds)
    compiled: Any = None
    arguments: tuple = ()
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    needed_bytes: int | None = None
    flops: float | None = None
    copied_bytes: int | None = None
    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(function())
    return time.process_time() - cpu, time.perf_counter() - wall


def step_function(work: Workload, method: str, microbatch_size: int | None = None) -> Callable:
    """``step(params, frozen, batch)``: the sum of gradients, and the norms where they are had."""

    def plain(params, frozen, batch):
        losses = jax.vmap(work.make_loss(frozen), (None, 0))
        return jax.grad(lambda p: jnp.sum(losses(p, batch)))(params), None

    def accumulated(params, frozen, batch):
        def add(total, rows):
            return jax.tree.map(jnp.add, total, plain(params, frozen, rows)[0]), None

        rows = jax.tree.map(lambda x: x.reshape(-1, microbatch_size, *x.shape[1:]), batch)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), rows)[0], None

    def own(params, frozen, batch):
        grad_fn = clipped_grad(
            work.make_loss(frozen),
            CLIP_NORM,
            method=method,  # pyright: ignore[reportArgumentType]
            microbatch_size=microbatch_size,
        )
        total, info = grad_fn(params, batch)
        return total, info.sensitive_norms

    def theirs(params, frozen, batch):
        from jax_privacy import clipped_grad  # pyright: ignore[reportMissingImports]

        grad_fn = clipped_grad(
            work.make_loss(frozen),
            l2_clip_norm=CLIP_NORM,
            keep_batch_dim=False,
            microbatch_size=microbatch_size,
        )
        return grad_fn(params, batch), None

    if method == "non-private":
        return plain if microbatch_size is None else accumulated
    return theirs if method == "jax-privacy" else own


def compile_step(
    work: Workload, label: str, dump: pathlib.Path | None, microbatch_size: int | None = None
) -> Row:
    """Compiles for the workload's shapes; runs nothing. Errors of the method pass through."""
    method = label.removesuffix("-best")
    arguments = (work.params, work.frozen, work.batch)
    start = time.perf_counter()
    step = jax.jit(step_function(work, method, microbatch_size))
    compiled = step.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{work.name}_{label}.hlo.txt").write_text(text, encoding="utf-8")
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    row = Row(
        label,
        call=lambda: timed(lambda: compiled(*arguments)),
        compiled=compiled,
        arguments=arguments,
        compile_seconds=seconds,
        flops=cost.get("flops"),
        copied_bytes=copied_bytes(text),
    )
    if memory is not None:
        row.temp_bytes = memory.temp_size_in_bytes
        row.needed_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes
    if microbatch_size is not None:
        row.note = f"microbatch {microbatch_size}"
    return row


_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* (copy|transpose|fusion)\("
)
_BRANCHES = re.compile(
    r" conditional\(.*?(?:branch_computations=\{([^}]*)\}"
    r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_WIDTHS = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
_MOVES = {"copy", "transpose", "bitcast", "reshape", "wrapped", "fusion"}


def copied_bytes(text: str) -> int:
    """Bytes that a compiled program writes only to lay arrays out again.

    These are copies and transposes outside of fusions, and fusions named after nothing else. The
    body of a loop counts once; of a conditional's branches, the one that copies least: ours are
    there for examples that hold a NaN or a norm in doubt.

    Example:
      >>> copied_bytes("ENTRY %main {\\n  %copy.1 = f32[2,3]{0,1} copy(%x)\\n}")
      24
    """
    own: dict[str, int] = {}
    calls: dict[str, list[list[str]]] = {}  # for each call, the computations it chooses from
    name = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
            entry = name if line.startswith("ENTRY ") else entry
            own[name], calls[name] = 0, []
        elif name:
            own[name] += _moved(line)
            calls[name] += [[c] for c in re.findall(r" body=%?([\w.\-]+)", line)]
            calls[name] += [[c] for c in re.findall(r" call\(.*to_apply=%?([\w.\-]+)", line)]
            for branches, *pair in _BRANCHES.findall(line):
                calls[name].append(re.findall(r"[\w.\-]+", branches) or pair)

    def total(computation: str) -> int:
        inner = sum(min(total(c) for c in choices) for choices in calls.get(computation, ()))
        return own.get(computation, 0) + inner

    return total(entry)


def _moved(line: str) -> int:
    found = _INSTRUCTION.match(line)
    if not found:
        return 0
    name, dtype, dims, opcode = found.groups()
    words = set(re.split(r"[._\-]", name)) - {""}
    if opcode == "fusion" and not all(w in _MOVES or w.isdigit() for w in words):
        return 0
    sizes = [int(d) for d in dims.split(",") if d]
    return math.prod(sizes) * _WIDTHS.get(dtype, 4)


def gradient_bytes(work: Workload) -> int:
    """Of one gradient for each example."""
    examples = jax.tree.leaves(work.batch)[0].shape[0]
    return examples * sum(leaf.nbytes for leaf in jax.tree.leaves(work.params))


def memory_limit() -> float:
    """Bytes a step may take: nine tenths of an accelerator, or half of free memory."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return 0.9 * stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if found:
            return int(found.group(1)) * 1024 / 2
    return 8e9


class OpacusError(Exception):
    """The other process ended; the message is its last line."""


class Opacus:
    """A process that runs Opacus steps on request; see clipping_opacus.py."""

    def __init__(self, python: str, work: Workload, core: int | None):
        assert work.config is not None
        self._folder = tempfile.TemporaryDirectory()
        self._errors = open(pathlib.Path(self._folder.name) / "stderr", "w+")  # noqa: SIM115
        path = pathlib.Path(self._folder.name) / "model.npz"
        arrays = {
            jax.tree_util.keystr(at, simple=True, separator="/"): np.asarray(leaf)
            for at, leaf in jax.tree_util.tree_leaves_with_path(work.params)
        }
        np.savez(path, tokens=np.asarray(work.batch["tokens"]), **arrays)  # pyright: ignore
        worker = pathlib.Path(__file__).with_name("clipping_opacus.py")
        config = json.dumps(dataclasses.asdict(work.config))
        self._process = subprocess.Popen(
            [python, str(worker), str(path), config, str(-1 if core is None else core)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.versions = self._reply()

    def ask(self, command: str, method: str) -> dict[str, Any]:
        """``command`` is "check" or "time"."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # where it died, the reply says why
            self._process.stdin.write(f"{command} {method}\n")
            self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise OpacusError(lines[-1] if lines else f"exit code {self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._errors.close()
        self._folder.cleanup()


def host(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]


def relative_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """L2 distance over L2 norm, all leaves together."""
    pairs = zip(found, expected, strict=True)
    distance = sum(float(np.sum(np.square(a - b), dtype=np.float64)) for a, b in pairs)
    size = sum(float(np.sum(np.square(b), dtype=np.float64)) for b in expected)
    return (distance / size) ** 0.5 if size else distance**0.5
