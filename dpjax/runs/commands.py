"""What each subcommand does: the library's functions with progress on the terminal."""

import contextlib
import dataclasses
import pathlib
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dpjax.data import DOMAIN_LABELS, Tokenizer, domain_records, write_domain_records
from dpjax.errors import DpjaxError
from dpjax.generation import stream
from dpjax.ledger import Ledger
from dpjax.mechanism import DPSGD
from dpjax.models import count_parameters, save_pretrained
from dpjax.runs.config import TrainConfig, fresh_key
from dpjax.runs.execute import AnyState, execute
from dpjax.runs.federation import FederateConfig, base_config, describe_federation
from dpjax.runs.finish import Finished, finish, page_path, refresh
from dpjax.runs.folder import Run, create, open_run, reopen
from dpjax.runs.sources import open_model

console = Console(highlight=False, soft_wrap=True)
errors = Console(highlight=False, soft_wrap=True, stderr=True)


def finished_run(config: TrainConfig) -> Finished:
    """The finished run of a configuration: a new one, the rest of one, or one that is there."""
    folder = pathlib.Path(config.output)
    if (folder / "run.json").exists():
        run = reopen(folder)
        if run.config != config:
            raise DpjaxError(
                f"{folder} holds a run of another configuration; choose another --output, or give "
                "the same options"
            )
    else:
        run = open_run(config, folder)
        create(run)
    with Ledger.open(run.ledger_path) as ledger:
        if (folder / "evaluation.json").exists():
            return refresh(run, ledger)
        console.print(describe(run))
        return finish(run, ledger, drive(run, ledger, folder.name))


def train(config: TrainConfig) -> None:
    """`dpjax train`: a new run from a configuration."""
    folder = pathlib.Path(config.output)
    run = open_run(config, folder)
    create(run)
    _train_and_finish(run)


def federate(config: FederateConfig) -> None:
    """`dpjax federate`: a new federated run."""
    run = open_run(base_config(config), pathlib.Path(config.output), config)
    create(run)
    _train_and_finish(run)


def resume(folder: str) -> None:
    """`dpjax resume`: the rest of a stopped run."""
    _train_and_finish(reopen(folder))


def _train_and_finish(run: Run) -> None:
    console.print(describe(run))
    with Ledger.open(run.ledger_path) as ledger:
        state = drive(run, ledger, run.folder.name)
        done = finish(run, ledger, state)
    console.print(summary(done))


def describe(run: Run) -> str:
    """The plan in a few lines, before any private computation."""
    mechanism, size, federation = run.mechanism, len(run.training), run.federation
    units, turns, kind = "examples", "iterations", "record"
    if run.config.unit == "user":
        kind = "person"
    if federation is not None:
        units, turns, kind = "clients", "rounds", "client with all its records"
    lines = [
        f"{size:,} training {units} and {len(run.held_out):,} held-out examples of "
        f"{run.training.sequence_length} tokens; the unit of privacy is one {kind}",
        f"{count_parameters(run.start.params):,} parameters, "
        f"{count_parameters(run.point.trainable):,} trained; {mechanism.iterations} {turns} of "
        f"{mechanism.sampling_probability * size:g} {units} on average ({mechanism.sampling})",
    ]
    if federation is not None:
        lines.append(describe_federation(federation))
    if mechanism.is_private:
        delta = run.delta
        stated = f"epsilon {mechanism.epsilon(delta):.3f} (RDP)"
        with contextlib.suppress(DpjaxError):
            stated += f", {mechanism.epsilon(delta, 'pld'):.3f} (PLD)"
        lines.append(
            f"{stated} at delta {delta:g}: noise multiplier {mechanism.noise_multiplier:.4f}, clip "
            f"norm {mechanism.l2_clip_norm:g}, {mechanism.relation.name.lower()}"
        )
        lines += noise_advice(mechanism, count_parameters(run.point.trainable))
        if federation is not None and federation.simulated is not None:
            lines.append(federation.simulated.line())
    else:
        lines.append("no noise: no formal guarantee, at no epsilon")
    return "\n".join(lines)


def noise_advice(mechanism: DPSGD, trained: int) -> list[str]:
    """How much noise the updates will hold, and whether a larger batch would pay.

    For a given model and number of iterations, the loss under DP-SGD depends on noise and batch
    through their ratio (McKenna et al., 2025). Where the noise multiplier hardly grows with the
    batch, a larger batch is the cheapest way to a better model.

    Example:
      >>> mechanism = DPSGD(1.0, 0.01, 100, target_epsilon=8.0, target_delta=1e-5, population=5000)
      >>> for line in noise_advice(mechanism, 10_000):
      ...     print(line)
      noise-batch ratio 0.01002: the noise of one update has 1 times the clip norm
      advice: twice the batch at the same budget would cut the ratio by 43%; try 100 a batch
    """
    batch = mechanism.expected_batch_size
    ratio = (mechanism.noise_multiplier or 0.0) / batch
    lines = [
        f"noise-batch ratio {ratio:.4g}: the noise of one update has "
        f"{ratio * trained**0.5:.3g} times the clip norm"
    ]
    twice = 2 * mechanism.sampling_probability
    by_target = mechanism.target_epsilon is not None
    if by_target and twice < 0.5 and mechanism.truncated_batch_size is None:
        larger = dataclasses.replace(mechanism, sampling_probability=twice, noise_multiplier=None)
        saved = 1 - (larger.noise_multiplier or 0.0) / larger.expected_batch_size / ratio
        if saved > 0.25:
            lines.append(
                f"advice: twice the batch at the same budget would cut the ratio by {saved:.0%}; "
                f"try {larger.expected_batch_size:.0f} a batch"
            )
    return lines


def drive(run: Run, ledger: Ledger, label: str, *, quiet: bool = False) -> AnyState:
    """Executes a run with a progress bar: loss, tokens or clients per second, epsilon so far.

    The loss is the operator's: it is computed on private records and is not covered by epsilon.
    """
    curve = None
    if run.mechanism.is_private:
        curve = run.mechanism.epsilon_curve(run.delta)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("epsilon {task.fields[epsilon]}"),
        TimeRemainingColumn(),
    )
    state, federated = None, run.federation is not None
    unit = "clients/s" if federated else "tok/s"
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(label, total=run.mechanism.iterations, loss="-", speed="-", epsilon="-")
        clock, seen = None, 0
        for step in execute(run, ledger):
            state = step.state
            if step.sensitive_loss is None:
                break
            # The first step compiles; speed is counted from its end.
            if clock is None:
                clock = time.monotonic()
            else:
                seen += step.sensitive_clients if federated else step.sensitive_tokens
            elapsed = time.monotonic() - clock
            bar.update(
                task,
                completed=step.iteration,
                total=step.iterations,
                loss=f"{step.sensitive_loss:.3f}",
                speed=f"{seen / elapsed:,.{int(federated)}f} {unit}" if elapsed > 0 else "-",
                epsilon="none" if curve is None else f"{curve[step.iteration]:.2f}",
            )
    assert state is not None
    return state


def summary(done: Finished) -> Table:
    """Where things lie, and the held-out loss before and after."""
    run = done.run
    table = Table(title=f"run {run.folder}", show_header=False)
    table.add_row("held-out loss before", f"{done.before.nats_per_token:.4f} nats/token")
    table.add_row(
        "held-out loss after",
        f"{done.after.nats_per_token:.4f} nats/token (± {1.96 * done.after.standard_error:.4f})",
    )
    table.add_row("guarantee", done.claim)
    table.add_row("model to release", str(run.folder / "model"))
    table.add_row("privacy card", str(run.folder / "card.json"))
    table.add_row("report", str(page_path(run)))
    table.add_row("secret, for resuming only", str(run.folder / "checkpoints"))
    return table


def generate_text(
    folder: str, prompt: str, num_samples: int, seed: int | None, **settings: Any
) -> None:
    """`dpjax generate`: samples from a model; a single text is shown while it is written."""
    model = open_model(folder)
    if num_samples < 1:
        raise DpjaxError(f"num_samples is {num_samples}; use at least 1")
    tokenizer = model.tokenizer
    start = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    steps = stream(
        model.config,
        model.params,
        [start] * num_samples,
        fresh_key(seed),
        stop_token=(tokenizer.eos_id, *tokenizer.stop_ids),
        **settings,
    )
    texts: list[list[int]] = [[] for _ in range(num_samples)]
    shown = ""
    clock, counted = None, 0
    for step in steps:
        for text, new in zip(texts, step, strict=True):
            text += new
        # The first step compiles; speed is counted from its end.
        if clock is None:
            clock = time.monotonic()
        else:
            counted += sum(map(len, step))
        if num_samples == 1:
            # A character may be spread over tokens: its beginning decodes to U+FFFD until then.
            whole = _continued(tokenizer, prompt, start, texts[0]).rstrip("\ufffd")
            console.print(whole[len(shown) :], end="", markup=False)
            shown = whole
    seconds = time.monotonic() - clock if clock is not None else 0.0
    if num_samples == 1:
        console.print()
    else:
        for text in texts:
            console.print(_continued(tokenizer, prompt, start, text), markup=False)
            console.print("---")
    if counted and seconds > 0:
        rate = counted / seconds
        errors.print(f"{rate:,.{0 if rate >= 10 else 2}f} tokens/s after compilation")


def _continued(tokenizer: Tokenizer, prompt: str, start: list[int], new: list[int]) -> str:
    """The prompt with its continuation; decoded together, since some tokenizers drop the space in
    front of a text."""
    return prompt + tokenizer.decode([*start, *new])[len(tokenizer.decode(start)) :]


def export(folder: str, output: str, adapter: bool, base: str | None) -> None:
    """`dpjax export`: a model folder in Hugging Face's format."""
    model = open_model(folder)
    target = pathlib.Path(output)
    if target.exists() and any(target.iterdir()):
        raise DpjaxError(f"{target} is not empty; choose another --output")
    save_pretrained(target, model, adapter=adapter, base=base)
    kind = "PEFT adapter" if adapter else "model"
    console.print(f"{kind} for transformers and vLLM: {target}")


def invent_records(*, domain: str, output: str, num_records: int, locale: str, seed: int) -> None:
    """`dpjax records`: invented labelled records as jsonl."""
    records = domain_records(domain, num_records, seed=seed, locale=locale)
    write_domain_records(output, records)
    console.print(
        f"{len(records):,} invented {domain} records ({locale}): {output}\n"
        f"labels: {' '.join(DOMAIN_LABELS[domain])}"
    )


def card(folder: str, public: bool) -> None:
    """`dpjax card`: rebuilds card and page of a finished run, and prints the claim."""
    run = reopen(folder)
    with Ledger.open(run.ledger_path) as ledger:
        done = refresh(run, ledger, public=public)
    console.print(done.claim)
    for hazard in done.card["hazards"]:
        console.print(f"{hazard['severity']}: {hazard['text']}", markup=False)
    console.print(f"card: {run.folder / 'card.json'}\npage: {page_path(run, public)}")


def account(
    *,
    delta: float | None = None,
    target_delta: float | None = None,
    population: int | None = None,
    **settings: Any,
) -> None:
    """`dpjax epsilon` and `dpjax calibrate`."""
    mechanism = DPSGD(
        l2_clip_norm=1.0, population=population, target_delta=target_delta, **settings
    )
    at = delta if delta is not None else target_delta
    assert at is not None
    if target_delta is not None:
        console.print(f"noise multiplier {mechanism.noise_multiplier:.4f}")
    console.print(f"epsilon {mechanism.epsilon(at):.4f} by RDP at delta {at:g}")
    try:
        console.print(f"epsilon {mechanism.epsilon(at, 'pld'):.4f} by PLD")
    except DpjaxError as error:
        console.print(f"no PLD bound: {error}")
    console.print(
        f"{mechanism.sampling} sampling, {mechanism.relation.name.lower()}, unit: one record"
    )
