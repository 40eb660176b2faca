"""Drives a run through ledger, training and checkpoints, from wherever it stands."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from dpjax import federated
from dpjax.checkpoint import Checkpointer
from dpjax.errors import DpjaxError
from dpjax.federated import FederatedTrainState
from dpjax.ledger import Ledger, affordable_iterations
from dpjax.models import tuned_loss
from dpjax.runs.config import fresh_key
from dpjax.runs.federation import make_algorithm
from dpjax.runs.folder import Run, refuse_changes
from dpjax.training import TrainState, fit, init_state
from dpjax.types import LossFn

AnyState: TypeAlias = TrainState | FederatedTrainState


class Progress(NamedTuple):
    """What one iteration looked like to the operator. The loss is private: not for release."""

    iteration: int
    iterations: int  # that will be taken, after the budget guard
    sensitive_loss: float | None  # of the batch, about nats per token; None after the end
    sensitive_tokens: int  # positions differentiated
    state: AnyState
    sensitive_clients: int = 0  # of a federated round


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
    loss_fn = tuned_loss(run.start.config, run.point.frozen)
    state, advance = _prepare(run, loss_fn)
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
        rows = mask if run.federation is None else mask[mask.any(axis=-1)]  # of one example each
        positions = rows[0, ..., 1:].size
        # The loss is per position, padding included (a public constant); people read it per token.
        per_token = positions * len(rows) / max(1, rows[..., 1:].sum())
        iteration = int(state.iteration)
        for state, seen in advance(state, ledger, number, end):
            iteration += 1
            loss = seen.loss * per_token
            metrics.append(iteration, loss)
            if iteration % config.checkpoint_every == 0 or iteration == end:
                metrics.flush()
                _save(checkpointer, iteration, state, run, ledger)
            yield Progress(iteration, end, loss, seen.examples * positions, state, seen.clients)
        metrics.flush()
        ledger.end_run(number, "completed" if iteration == mechanism.iterations else "budget")
        # Nothing may have been left to do: the caller still needs the final state.
        yield Progress(iteration, end, None, 0, state)


class _Seen(NamedTuple):
    loss: float  # per position
    examples: int
    clients: int = 0


def _prepare(run: Run, loss_fn: LossFn) -> tuple[Any, Any]:
    """The first state, and what drives it on: ``advance(state, ledger, number, end)``."""
    key = fresh_key(run.config.seed)
    mechanism, federation = run.mechanism, run.federation
    if federation is None:

        def steps(state, ledger, number, end):
            trained = fit(
                state,
                mechanism,
                loss_fn,
                run.optimizer,
                run.training,
                ledger=ledger,
                run=number,
                max_iterations=end,
            )
            for state, info in trained:
                yield state, _Seen(float(info.sensitive_loss), int(info.sensitive_num_examples))

        return init_state(mechanism, run.point.trainable, run.optimizer, key), steps

    noise_key, key = jax.random.split(key)
    clients, config = federation.clients, federation.config
    algorithm = make_algorithm(config, mechanism, loss_fn, len(clients), noise_key)

    def rounds(state, ledger, number, end):
        trained = federated.fit(
            state,
            algorithm,
            mechanism,
            clients,
            local=federation.local,
            ledger=ledger,
            run=number,
            max_iterations=end,
            mesh=federation.mesh,
            engine=config.engine,
            clients_per_step=config.clients_per_step,
        )
        for state, info in trained:
            metrics = info.sensitive_metrics
            yield (
                state,
                _Seen(
                    float(metrics["loss"]),
                    int(metrics["examples"]),
                    int(info.sensitive_num_clients),
                ),
            )

    return federated.init_training(algorithm, run.point.trainable, len(clients), key), rounds


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
    checkpointer: Checkpointer, iteration: int, state: AnyState, run: Run, ledger: Ledger
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
