"""What a finished run leaves: model folder, privacy card and report page."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from dpjax.artifact import load_model, save_model
from dpjax.data import ArrayDataset
from dpjax.errors import DpjaxError
from dpjax.evaluation import HeldOutLoss, held_out_loss, record_losses
from dpjax.ledger import Ledger
from dpjax.models import Model, combine, count_parameters
from dpjax.report import CardInputs, Curve, Sample, TableData, build_card, write_card, write_report
from dpjax.report.client_figures import clients_figure
from dpjax.report.figures import standalone
from dpjax.report.files import write_whole
from dpjax.runs.config import peak_learning_rate, tuning_of
from dpjax.runs.execute import AnyState, find_run, read_metrics
from dpjax.runs.federation import card_facts
from dpjax.runs.folder import Run, read_json, write_json
from dpjax.types import PyTree


class Extras(NamedTuple):
    """More for the report page than the run itself knows."""

    tables: tuple[TableData, ...] = ()
    samples: tuple[Sample, ...] = ()
    curves: tuple[Curve, ...] = ()


class Finished(NamedTuple):
    """A finished run and what it released."""

    run: Run
    model: Model
    before: HeldOutLoss
    after: HeldOutLoss
    card: dict[str, Any]
    training_curve: Curve  # private

    @property
    def claim(self) -> str:
        """The guarantee in one sentence."""
        return self.card["claim"]["statement"]

    @property
    def epsilon(self) -> str:
        """Epsilon by both accountants, or that there is none, in words."""
        return self.card["claim"]["epsilon_in_words"]


def finish(run: Run, ledger: Ledger, state: AnyState) -> Finished:
    """Exports the model, evaluates it on held-out records, and writes card and page.

    Calling it again, after a kill say, writes the same things again.
    """
    start = run.start
    pretraining = (*start.pretraining, _as_pretraining(run))
    params = combine(state.params, run.point.frozen)
    model = Model(start.config, params, start.tokenizer, pretraining)
    sha256 = save_model(run.folder / "model", model)
    batch = 64 if start.config.vocabulary_size < 5000 else 16
    before = held_out_loss(start.config, start.params, run.held_out, batch)
    after = held_out_loss(start.config, params, run.held_out, batch)
    # Numbers that a later `dpjax card` repeats.
    write_json(
        run.folder / "evaluation.json",
        {"before": before._asdict(), "after": after._asdict(), "params_sha256": sha256},
    )
    if run.federation is not None:
        write_client_losses(run, params, batch)
    return _finished(run, ledger, model, sha256, before, after)


def refresh(run: Run, ledger: Ledger, public: bool = False) -> Finished:
    """Card and page of a finished run, rebuilt from what it left on disk."""
    saved = read_json(
        run.folder / "evaluation.json",
        f"{run.folder} is not finished; continue it with `dpjax resume {run.folder}`",
    )
    try:
        before, after = HeldOutLoss(**saved["before"]), HeldOutLoss(**saved["after"])
        sha256 = saved["params_sha256"]
    except (KeyError, TypeError) as error:
        where = run.folder / "evaluation.json"
        raise DpjaxError(f"{where} is corrupt ({error}); restore the file") from None
    return _finished(run, ledger, load_model(run.folder / "model"), sha256, before, after, public)


def _finished(
    run: Run,
    ledger: Ledger,
    model: Model,
    sha256: str,
    before: HeldOutLoss,
    after: HeldOutLoss,
    public: bool = False,
) -> Finished:
    card = build_card(card_inputs(run, ledger, sha256, before, after))
    write_card(card, run.folder / "card.json")
    done = Finished(run, model, before, after, card, training_curve(run))
    tables = client_tables(run) if run.federation is not None and not public else ()
    write_page(done, Extras(tables=tables), public=public)
    return done


def page_path(run: Run, public: bool = False) -> pathlib.Path:
    """Where the report lies; the public one has nothing in it that epsilon does not cover."""
    return run.folder / ("report-public.html" if public else "report.html")


def write_page(done: Finished, extras: Extras | None = None, public: bool = False) -> None:
    """Writes the report page of a finished run, with more on it if there is more."""
    extras = Extras() if extras is None else extras
    write_report(
        done.card,
        (done.training_curve, held_out_curve(done), *extras.curves),
        page_path(done.run, public),
        samples=extras.samples,
        tables=extras.tables,
        public=public,
    )


def write_client_losses(run: Run, params: PyTree, batch: int) -> None:
    """clients.json and clients.svg: each client's loss before and after, for the owner only."""
    assert run.federation is not None
    clients = run.federation.clients
    rows = ArrayDataset(clients.examples)
    losses = {}
    for name, some in (("before", run.start.params), ("after", params)):
        totals, counts = record_losses(run.start.config, some, rows, batch)
        sums = [(totals[own].sum(), counts[own].sum()) for own in clients.rows if len(own)]
        losses[name] = [float(total / max(1.0, count)) for total, count in sums]
    write_json(run.folder / "clients.json", losses)
    if all(np.all(np.isfinite(values)) for values in losses.values()):
        figure = standalone(clients_figure(losses))
        write_whole(run.folder / "clients.svg", figure)


def client_tables(run: Run) -> tuple[TableData, ...]:
    """Quantiles of the clients' losses, as the last `finish` left them."""
    path = run.folder / "clients.json"
    losses = read_json(path, f"{path} is missing; continue with `dpjax resume {run.folder}`")
    shares = (0.1, 0.5, 0.9, 1.0)
    names = ("a tenth below", "half below", "a tenth above", "worst")
    rows = [
        [name, *(f"{value:.3f}" for value in np.quantile(values, shares))]
        for name, values in losses.items()
    ]
    title = "Clients' own losses (nats per token)"
    return (TableData(title, ("model", *names), rows),)


def _as_pretraining(run: Run) -> dict[str, Any]:
    """How this run's data will appear on the card of a model that starts from its result."""
    public = run.config.data == "shakespeare"
    return {"name": run.training.name, "public": public, "overlap": "none" if public else "unknown"}


def training_curve(run: Run) -> Curve:
    """Training loss by iteration, about nats per token. Private."""
    metrics = [m for m in read_metrics(run.folder / "metrics.jsonl") if m["loss"] is not None]
    return Curve(
        run.folder.name,
        np.array([m["iteration"] for m in metrics], dtype=np.int64),
        np.array([m["loss"] for m in metrics], dtype=np.float64),
    )


def held_out_curve(done: Finished) -> Curve:
    """Held-out loss before and after, nats per token. Private."""
    values = [done.before.nats_per_token, done.after.nats_per_token]
    iterations = [0, max(1, int(done.card["accounting"]["steps_executed"]))]
    return Curve(done.training_curve.name, iterations, values, "held out")


def read_audit(run: Run, sha256: str) -> dict[str, Any] | None:
    """What `dpjax audit run` found about this very model; None if it was not audited."""
    path = run.folder / "audit.json"
    if not path.exists():
        return None
    saved = read_json(path, f"{path} is missing")
    if saved.get("params_sha256") != sha256 or not isinstance(saved.get("section"), dict):
        raise DpjaxError(f"{path} is of another model; remove it and run `dpjax audit run` again")
    return saved["section"]


def _trained(run: Run) -> str:
    """Which parameters training changed, in words."""
    config, tuning = run.config, tuning_of(run.config)
    if tuning == "lora":
        lora = run.start.config.lora
        assert lora is not None
        return f"LoRA of rank {lora.rank} (scaling {lora.scaling:g}) on {', '.join(lora.targets)}"
    words = {"last_layers": f"the last {config.last_layers} layers", "bias": "biases"}
    return words.get(tuning, "all")


def card_inputs(
    run: Run, ledger: Ledger, sha256: str, before: HeldOutLoss, after: HeldOutLoss
) -> CardInputs:
    """Everything that the card needs beside the mechanism and the ledger."""
    config, training = run.config, run.training
    number = find_run(ledger, run.identifier)
    if number is None:
        raise DpjaxError(f"{run.folder} is not in ledger {run.ledger_path}; train it first")
    parameters = count_parameters(run.start.params)
    trained = count_parameters(run.point.trainable)
    source = "" if run.start_is_preset else f"{pathlib.Path(config.model).name}: "

    def utility(name: str, loss: HeldOutLoss) -> dict[str, Any]:
        return {
            "metric": "loss",
            "unit": "nats per token",
            "model": name,
            "split": "held out",
            "value": loss.nats_per_token,
            "low": loss.nats_per_token - 1.96 * loss.standard_error,
            "high": loss.nats_per_token + 1.96 * loss.standard_error,
            "n": loss.num_records,
            "covered": False,
        }

    devices = jax.local_devices()
    facts: dict[str, Any] = {
        "optimizer": f"{config.optimizer}, peak learning rate {peak_learning_rate(config):g}",
    }
    if run.federation is not None:
        facts = card_facts(run.federation, run.mechanism.is_private)
    return CardInputs(
        mechanism=run.mechanism,
        ledger=ledger,
        run=number,
        delta=run.delta,
        unit=(
            f"one person with at most {config.max_examples_per_user} rows of "
            f"{training.sequence_length} tokens"
            if config.unit == "user"
            else f"one record of at most {training.sequence_length} tokens"
        ),
        # The bound that was enforced; the largest count found would be a fact about one person.
        max_units_per_person=1 if config.unit == "user" else config.max_examples_per_user,
        dataset_name=training.name,
        dataset_size=len(training),
        dataset_size_is_public=True,  # the sampling probability and normaliser reveal it
        examples_per_record=training.examples_per_record,
        preprocessing=training.preprocessing,
        contribution_bounding=(
            f"at most {config.max_examples_per_user} examples per person"
            if config.max_examples_per_user is not None
            else "none"
        ),
        pretraining=run.start.pretraining,
        model_name=f"{source}decoder with {parameters:,} parameters, trained: {_trained(run)}",
        num_parameters=parameters,
        num_trained_parameters=trained,
        artifact_sha256=sha256,
        released=("final weights (the model folder)",),
        intended_use=config.intended_use,
        published_key=config.seed is not None,
        precision=(
            f"{run.start.config.dtype} parameters, {run.start.config.activation_dtype} "
            "activations; float32 norms, sum and noise"
        ),
        devices=(f"{devices[0].platform} x {len(devices)}",),
        config_sha256=run.config_sha256,
        not_covered=(
            "losses shown or logged while training",
            "evaluation on held-out records",
        ),
        utility=(utility("before training", before), utility("after training", after)),
        audit=read_audit(run, sha256),
        **facts,
    )
