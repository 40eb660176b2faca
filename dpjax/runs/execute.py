"""Drives a run through ledger, training and checkpoints, from wherever it stands."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dpjax.checkpoint import Checkpointer
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger, affordable_iterations
from dpjax.models import tuned_loss
from dpjax.runs.config import fresh_key
from dpjax.runs.folder import Run, refuse_changes
from dpjax.training import TrainState, fit, init_state


class Progress(NamedTuple):
    """What one iteration looked like to the operator. The loss is private: not for release."""

    iteration: int
    iterations: int  # that will be taken, after the budget guard
    sensitive_loss: float | None  # of the batch, about nats per token; None after the end
    sensitive_tokens: int  # positions differentiated
    state: TrainState


def execute(run: Run, ledger: Ledger) -> Iterator[Progress]:
    """Trains until the plan or the budget ends; safe to kill at any moment and to call again.

    Order matters. The first checkpoint, which holds the keys, precedes the first entry in the
    ledger; each entry precedes the computation of its step; each checkpoint is complete before it
    is visible. So after a crash the ledger holds every release that happened, and the lost ones
    are repeated bit for bit.

    Args:
      run: from `open_run` or `reopen`.
      ledger: open; must be the run's own.

    Yields:
      One `Progress` per iteration.
    """
    config, mechanism = run.config, run.mechanism
    state = init_state(mechanism, run.point.trainable, run.optimizer, fresh_key(config.seed))
    number = find_run(ledger, run.identifier)
    with Checkpointer(run.folder / "checkpoints") as checkpointer:
        if checkpointer.latest() is not None:
            state, facts = checkpointer.restore(state)
            refuse_changes(facts["run"], run.facts, run.folder)
            _check_prefix(ledger, facts, run)
        elif number is not None and ledger.releases(number):
            raise DpjaxError(
                f"{run.folder} has releases in its ledger but no checkpoint; its keys are lost, so "
                "it cannot be continued: start a new run on the same ledger"
            )
        else:
            _save(checkpointer, 0, state, run, ledger)
        if number is None:
            number = ledger.start_run(mechanism, len(run.training), ledger_facts(run))
        end = mechanism.iterations
        if mechanism.target_epsilon is not None and mechanism.target_delta is not None:
            end = affordable_iterations(
                ledger,
                number,
                mechanism,
                len(run.training),
                mechanism.target_epsilon,
                mechanism.target_delta,
            )
        metrics = _Metrics(run.folder / "metrics.jsonl", int(state.iteration))
        mask = run.training.loss_mask
        positions = mask[0, ..., 1:].size
        # The loss is per position, padding included (a public constant); people read it per token.
        per_token = positions * len(mask) / max(1, mask[..., 1:].sum())
        loss_fn = tuned_loss(run.start.config, run.point.frozen)
        steps = fit(
            state,
            mechanism,
            loss_fn,
            run.optimizer,
            run.training,
            ledger=ledger,
            run=number,
            max_iterations=end,
        )
        iteration = int(state.iteration)
        for state, info in steps:
            iteration += 1
            loss = float(info.sensitive_loss * per_token)
            metrics.append(iteration, loss)
            if iteration % config.checkpoint_every == 0 or iteration == end:
                metrics.flush()
                _save(checkpointer, iteration, state, run, ledger)
            tokens = int(info.sensitive_num_examples) * positions
            yield Progress(iteration, end, loss, tokens, state)
        metrics.flush()
        ledger.end_run(number, "completed" if iteration == mechanism.iterations else "budget")
        # Nothing may have been left to do: the caller still needs the final state.
        yield Progress(iteration, end, None, 0, state)


def find_run(ledger: Ledger, identifier: str) -> int | None:
    """Number of the run with this identifier in the ledger, if it has begun."""
    for record in ledger.records:
        if record["kind"] == "run" and record["config"].get("identifier") == identifier:
            return record["run"]
    return None


def ledger_facts(run: Run) -> dict[str, Any]:
    """What the ledger keeps of a run's plan beside the mechanism; public."""
    return {
        "identifier": run.identifier,
        "config_sha256": run.config_sha256,
        "data_sha256": run.facts["data_sha256"],
        "versions": run.facts["versions"],
        **({"audit": run.facts["audit"]} if "audit" in run.facts else {}),
    }


def _save(
    checkpointer: Checkpointer, iteration: int, state: TrainState, run: Run, ledger: Ledger
) -> None:
    facts = {
        "run": run.facts,
        "ledger_length": len(ledger.records),
        "ledger_head": ledger.head,
    }
    checkpointer.save(iteration, state, facts)


def _check_prefix(ledger: Ledger, facts: dict[str, Any], run: Run) -> None:
    """The ledger must continue the one that the checkpoint saw."""
    length, head = facts["ledger_length"], facts["ledger_head"]
    found = ledger.records[length - 1]["hash"] if 0 < length <= len(ledger.records) else None
    if length and found != head:
        raise DpjaxError(
            f"ledger {run.ledger_path} has {len(ledger.records)} entries and does not contain the "
            f"{length} that the checkpoint was saved with; restore the ledger, the privacy spent "
            "is unknown"
        )


class _Metrics:
    """Training losses by iteration, one JSON line each, written in blocks."""

    def __init__(self, path: pathlib.Path, keep: int):
        self._path = path
        kept = [f"{json.dumps(r)}\n" for r in read_metrics(path) if r["iteration"] <= keep]
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(kept)
        self._waiting: list[str] = []

    def append(self, iteration: int, loss: float) -> None:
        value = loss if np.isfinite(loss) else None
        self._waiting.append(json.dumps({"iteration": iteration, "loss": value}) + "\n")

    def flush(self) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._waiting)
        except OSError as error:
            raise DpjaxError(
                f"{self._path} cannot be written ({error.strerror}); make room and resume"
            ) from None
        self._waiting = []


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Training losses so far; an unfinished last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
