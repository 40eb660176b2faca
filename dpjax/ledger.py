"""An append-only, hash-chained record of every noisy release, and the guard that reads it.

One JSON object per line. Each holds the hash of the line before it and its own, so an edit, a
deletion or a reordering is found when the file is opened. A release is written, and on disk, before
the step is computed: a crash can leave a release that never happened in the ledger, never one that
happened outside it. Nothing in a line depends on the private records.
"""

import collections
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import dp_accounting

from dpjax import accounting
from dpjax import sampling as samplers
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD
from dpjax.releases import released_dp_event
from dpjax.strategies import Strategy, described, from_description
from dpjax.types import NeighboringRelation

try:
    import fcntl
except ImportError:  # not a POSIX system: two writers are then the user's to prevent
    fcntl = None

GENESIS = "0" * 64


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(record).encode()).hexdigest()


def describe_release(
    sampler: samplers.Sampler, noise_multiplier: float, strategy: Strategy | None = None
) -> dict[str, Any]:
    """What one iteration does, from the objects that do it; `released_event` reads it back.

    With correlated noise (a strategy) the noise multiplier is that of the whole run.

    Example:
      >>> sampler = samplers.PoissonSampler(1000, sampling_probability=0.1)
      >>> describe_release(sampler, 1.5)
      {'sampling': 'poisson', 'population': 1000, 'sampling_probability': 0.1, \
'noise_multiplier': 1.5}
    """
    hidden = ("key", "multiple_of")
    fields = {
        field.name: getattr(sampler, field.name)
        for field in dataclasses.fields(sampler)
        if field.name not in hidden
    }
    release = {"sampling": sampler.name, **fields, "noise_multiplier": noise_multiplier}
    return release if strategy is None else {**release, "strategy": described(strategy)}


def released_event(release: dict[str, Any], count: int) -> dp_accounting.DpEvent:
    """dp_accounting event of ``count`` such releases, the first of one run."""
    fields = dict(release)
    kind = samplers.SAMPLERS[fields.pop("sampling")]
    noise_multiplier = fields.pop("noise_multiplier")
    strategy = fields.pop("strategy", None)
    strategy = None if strategy is None else from_description(strategy)
    return released_dp_event(kind(**fields), noise_multiplier, count, strategy)


class Ledger:
    """The open ledger file of one data set. Open it with `Ledger.open`; one writer at a time.

    Example:
      >>> import jax, tempfile
      >>> folder = tempfile.TemporaryDirectory()
      >>> mechanism = DPSGD(1.0, 0.1, 100, noise_multiplier=2.0)
      >>> with Ledger.open(f"{folder.name}/ledger.jsonl") as ledger:
      ...     run = ledger.start_run(mechanism, population=1000, config={})
      ...     sampler = mechanism.sampler(1000, key=jax.random.key(0))
      ...     ledger.record_release(run, 0, sampler, 2.0)
      ...     print(f"{ledger.epsilon(1e-5):.3f}", len(ledger.records))
      0.526 2
      >>> folder.cleanup()
    """

    def __init__(self, path: pathlib.Path, descriptor: int, records: list[dict[str, Any]]):
        self._path = path
        self._descriptor = descriptor
        self.records = records
        self._releases = {
            (r["run"], r["iteration"]): r["release"] for r in records if r["kind"] == "release"
        }
        self._iterations = collections.Counter(run for run, _ in self._releases)
        self._planned = {r["run"]: r["plan"]["release"] for r in records if r["kind"] == "run"}

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Ledger":
        """Opens or creates the file, checks every hash and takes the writer's lock.

        Raises:
          DpjaxError: the chain is broken (with the line), or another process is writing.
        """
        path = pathlib.Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DpjaxError(
                f"ledger {path} cannot be opened ({error.strerror}); check the folder"
            ) from None
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise DpjaxError(
                    f"ledger {path} is in use by another process; wait for it, or give this run "
                    "its own ledger"
                ) from None
        try:
            content = path.read_bytes()
            # A line without its end was being written when the process died. Its release had not
            # been computed, because writing comes first; so dropping it loses nothing.
            complete = content.rfind(b"\n") + 1
            records = read_records(content[:complete], path)
            if complete < len(content):
                os.ftruncate(descriptor, complete)
            os.lseek(descriptor, 0, os.SEEK_END)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, records)

    @property
    def head(self) -> str:
        """Hash of the last line (sha256, hex); 64 zeros for an empty ledger."""
        return self.records[-1]["hash"] if self.records else GENESIS

    def _append(self, kind: str, **body: Any) -> dict[str, Any]:
        record = {"index": len(self.records), "kind": kind, "previous": self.head, **body}
        record["hash"] = _digest(record)
        line = (_canonical(record) + "\n").encode()
        start = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, start)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise DpjaxError(
                f"ledger {self._path} cannot be written ({reason}); the step was not taken; make "
                "room and resume"
            ) from None
        self.records.append(record)
        return record

    def start_run(self, mechanism: DPSGD, population: int, config: dict[str, Any]) -> int:
        """Records the plan of a run before its first release; returns the run's number.

        Every run in a ledger counts towards its total: hyper-parameter trials are runs.
        ``config`` holds public, JSON-compatible facts (hashes, versions) to compare on resume.
        """
        run = self.num_runs
        release = planned_release(mechanism, population)
        self._append(
            "run",
            run=run,
            plan={
                "release": release,
                "iterations": mechanism.iterations,
                "neighboring_relation": mechanism.relation.name.lower(),
                "l2_clip_norm": mechanism.l2_clip_norm,
                "normalize_by": mechanism.normalize_by,
                "target_epsilon": mechanism.target_epsilon,
                "target_delta": mechanism.target_delta,
                "accountant": mechanism.accountant,
            },
            config=config,
        )
        self._planned[run] = release
        return run

    def record_release(
        self,
        run: int,
        iteration: int,
        sampler: samplers.Sampler,
        noise_multiplier: float,
        strategy: Strategy | None = None,
    ) -> None:
        """Writes one release to disk; call it before the step is computed.

        A resumed run recomputes releases that were recorded but lost: same key, same rows, same
        noise, hence the same release, which costs nothing again. It is accepted if it is described
        exactly as before, refused otherwise. Correlated releases make one event together, so with
        a strategy (``mechanism.strategy``) each must be as the run's plan has it.
        """
        release = describe_release(sampler, noise_multiplier, strategy)
        planned = self._planned.get(run, {})
        if release != planned and "strategy" in {**release, **planned}:
            raise DpjaxError(
                f"iteration {iteration} of run {run} would be {release}, but its plan is {planned};"
                " correlated noise is accounted for as a whole: start a new run"
            )
        if strategy is not None and iteration >= strategy.iterations:
            raise DpjaxError(
                f"iteration {iteration} of run {run} is beyond the {strategy.iterations} that its "
                "correlated noise is planned for; start a new run"
            )
        before = self._releases.get((run, iteration))
        if before is not None:
            if before != release:
                raise DpjaxError(
                    f"iteration {iteration} of run {run} is in the ledger as {before}, and would "
                    f"now be {release}; a recorded release cannot be replaced: start a new run"
                )
            return
        expected = self._iterations[run]
        if iteration != expected:
            raise DpjaxError(
                f"iteration {iteration} of run {run} does not follow the {expected} iterations in "
                f"ledger {self._path}; the ledger is not the one this run wrote"
            )
        self._append("release", run=run, iteration=iteration, release=release)
        self._releases[run, iteration] = release
        self._iterations[run] += 1

    def record_answer(self, answer: dict[str, Any]) -> None:
        """Writes one answer of a `dpjax.federated.Worker` to disk; call it before it is given.

        Such a ledger is a worker's own: what it cost is read by `Worker.spent`, not by `epsilon`.
        """
        if any(record["kind"] != "answer" for record in self.records):
            raise DpjaxError(
                f"ledger {self._path} holds training runs; give the worker a ledger of its own"
            )
        self._append("answer", **answer)

    def end_run(self, run: int, reason: str) -> None:
        """Records why a run ended ("completed" or "budget"); once per run."""
        if not any(r["kind"] == "end" and r["run"] == run for r in self.records):
            self._append("end", run=run, reason=reason)

    def reveal_canaries(self, run: int, secret: bytes, included: Sequence[bool]) -> None:
        """Records the coins of an audit, after the run and before anything is made of the scores.

        Args:
          secret: whose hash is in the run's plan (``config["audit"]["commitment"]``).
          included: the coins, which follow from the secret.

        Raises:
          DpjaxError: the run has no such commitment, has not ended, or was revealed otherwise.
        """
        bits = "".join("1" if coin else "0" for coin in included)
        for record in self.records:
            if record["kind"] == "canaries" and record["run"] == run:
                if (record["secret"], record["included"]) != (secret.hex(), bits):
                    raise DpjaxError(
                        f"run {run} was revealed with other coins in ledger {self._path}"
                    )
                return
        if not any(r["kind"] == "end" and r["run"] == run for r in self.records):
            raise DpjaxError(
                f"run {run} has not ended; coins that are revealed earlier prove nothing"
            )
        self._append("canaries", run=run, secret=secret.hex(), included=bits)

    @property
    def num_runs(self) -> int:
        return sum(1 for record in self.records if record["kind"] == "run")

    def plan(self, run: int) -> dict[str, Any]:
        """The record that `start_run` wrote, with its ``plan`` and ``config``."""
        for record in self.records:
            if record["kind"] == "run" and record["run"] == run:
                return record
        raise DpjaxError(f"run {run} is not in ledger {self._path}, which has {self.num_runs} runs")

    def releases(self, run: int | None = None) -> list[tuple[dict[str, Any], int]]:
        """Distinct releases with their counts, of one run or of all."""
        counted: dict[str, tuple[dict[str, Any], int]] = {}
        for (of_run, _), release in self._releases.items():
            if run is None or of_run == run:
                name = f"{of_run} {_canonical(release)}"
                counted[name] = (release, counted.get(name, (release, 0))[1] + 1)
        return list(counted.values())

    def dp_event(self, run: int | None = None) -> dp_accounting.DpEvent:
        """Event of everything released so far, over all runs or in one."""
        if any(record["kind"] == "answer" for record in self.records):
            raise DpjaxError(
                f"ledger {self._path} holds answers of a worker; read them with Worker.spent"
            )
        events = [released_event(release, count) for release, count in self.releases(run)]
        if not events:
            return dp_accounting.NoOpDpEvent()
        return events[0] if len(events) == 1 else dp_accounting.ComposedDpEvent(events)

    def neighboring_relation(self) -> NeighboringRelation:
        """The one relation of all runs; runs under different ones do not compose."""
        names = {r["plan"]["neighboring_relation"] for r in self.records if r["kind"] == "run"}
        if len(names) > 1:
            raise DpjaxError(
                f"ledger {self._path} holds runs under {sorted(names)}; guarantees under different "
                "neighbouring relations do not add up: keep one ledger for each"
            )
        return NeighboringRelation[(names.pop() if names else "add_or_remove_one").upper()]

    def epsilon(
        self, delta: float, accountant: accounting.Accountant = "rdp", run: int | None = None
    ) -> float:
        """Epsilon spent so far at ``delta``, by all runs together or by one."""
        relation = self.neighboring_relation()
        return accounting.epsilon(self.dp_event(run), delta, accountant, relation)

    def close(self) -> None:
        """Releases the lock; the file is complete after every call anyway."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def planned_release(mechanism: DPSGD, population: int) -> dict[str, Any]:
    """`describe_release` of every iteration of a mechanism's plan."""
    return describe_release(
        mechanism.planned_sampler(population),
        mechanism.noise_multiplier or 0.0,
        mechanism.strategy,
    )


def read_records(content: bytes, path: pathlib.Path) -> list[dict[str, Any]]:
    """Parses complete lines and checks the chain."""
    records: list[dict[str, Any]] = []
    previous = GENESIS
    # Split at newlines only: other separators may stand inside a JSON string.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        record = _parsed(line)
        claimed = record.pop("hash", None)
        follows = record.get("previous") == previous and record.get("index") == number - 1
        if claimed is None or not follows or _digest(record) != claimed:
            raise DpjaxError(
                f"ledger {path} is corrupt at line {number}: its hash does not follow from the "
                "lines before it; restore the file from a backup, the privacy spent is unknown"
            )
        record["hash"] = previous = claimed
        records.append(record)
    return records


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a line; empty, and so without a hash, if there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def affordable_iterations(
    ledger: Ledger,
    run: int,
    mechanism: DPSGD,
    population: int,
    target_epsilon: float,
    target_delta: float,
) -> int:
    """How many of this run's iterations fit the budget, next to every other run in the ledger.

    The budget guard of `dpjax.fit`: training stops after that many iterations, so the budget is
    never passed, not even by the last step.

    Returns:
      An integer in [0, mechanism.iterations].
    """
    others = [
        released_event(release, count)
        for number in range(ledger.num_runs)
        if number != run
        for release, count in ledger.releases(number)
    ]
    relation = ledger.neighboring_relation()

    def total(iterations: int) -> dp_accounting.DpEvent:
        own = released_event(planned_release(mechanism, population), iterations)
        return dp_accounting.ComposedDpEvent([*others, own]) if others else own

    def spent(iterations: int) -> float:
        return accounting.epsilon(total(iterations), target_delta, mechanism.accountant, relation)

    if spent(mechanism.iterations) <= target_epsilon:
        return mechanism.iterations
    return accounting.calibrate_iterations(
        total, target_epsilon, target_delta, mechanism.accountant, relation, mechanism.iterations
    )
