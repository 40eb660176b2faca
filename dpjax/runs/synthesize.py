"""Synthetic records: train on labelled private records, sample, filter, measure, say what holds.

A run folder then also holds:
synthetic.jsonl        the records to share
synthetic-card.json    their privacy card: epsilon of the training, by post-processing
quality.json           how good they are; read private records: for the owner
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from dpjax.data import Record, Tokenizer, stable_id
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.ledger import Ledger
from dpjax.models import Model
from dpjax.report import build_card, write_card
from dpjax.report.files import write_whole
from dpjax.runs.commands import console, finished_run
from dpjax.runs.config import TrainConfig, fresh_key
from dpjax.runs.finish import Finished, card_inputs
from dpjax.runs.folder import Run
from dpjax.runs.sources import prompt_for, read_records

Filter = Literal["empty", "unfinished", "duplicate"]
_REFUSED = {
    "copies": "compares samples with the private records",
    "classifier": "judges samples by a model of the private records",
    "pii": "is not built in: apply one whose patterns were not learned from the private records",
}


@dataclasses.dataclass(frozen=True)
class SynthesizeConfig:
    """Train on private records, then write synthetic ones that inherit the guarantee."""

    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    """The training run; one that its output folder holds already is continued or used as it is."""
    num_samples: int = 1000
    """Synthetic records wanted."""
    proportions: tuple[float, ...] = ()
    """Share of each of --labels (default: equal). Public: shares counted in the private records
    would be a release of their own."""
    max_new_tokens: int | None = None
    """Tokens per record (default: the training's sequence length)."""
    temperature: float = 1.0
    """Below 1: more typical, less varied."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = 0.95
    """Keep the likeliest tokens that together have this probability."""
    sample_batch_size: int = 32
    """Records drawn at once."""
    filters: tuple[Annotated[str, tyro.conf.arg(metavar="NAME")], ...] = ("empty", "duplicate")
    """Drops samples that are "empty", "unfinished" (cut at the length) or a "duplicate" of another
    sample. Filters that read private records are refused."""
    quality: bool = True
    """Measure the samples against the private and the held-out records (quality.json)."""


class Synthetic(NamedTuple):
    """What sampling gave."""

    records: list[Record]  # text and label; no user
    drawn: int  # before the filters
    dropped: dict[str, int]  # by filter
    tokens_per_second: float  # compilation included


def synthesize(config: SynthesizeConfig) -> dict[str, Any]:
    """`dpjax synthesize`: the whole way from private records to synthetic ones and their card."""
    check_filters(config.filters)
    _shares(config)
    done = finished_run(config.train)
    run = done.run
    console.print(done.claim)
    found = sample_records(config, done.model, fresh_key(config.train.seed))
    path = run.folder / "synthetic.jsonl"
    text = "".join(
        json.dumps({"text": r.text, "label": r.label}, ensure_ascii=False) + "\n"
        for r in found.records
    )
    write_whole(path, text)
    with Ledger.open(run.ledger_path) as ledger:
        card = synthetic_card(done, ledger, text, len(found.records))
    write_card(card, run.folder / "synthetic-card.json")
    console.print(
        f"{len(found.records):,} synthetic records of {found.drawn:,} drawn "
        f"({found.tokens_per_second:,.0f} tokens/s); dropped: "
        + (", ".join(f"{n} {name}" for name, n in found.dropped.items()) or "none")
    )
    result: dict[str, Any] = {"records": len(found.records), "drawn": found.drawn}
    if config.quality:
        from dpjax.runs.quality import measure, quality_table

        result["quality"] = measure(done, found.records)
        write_whole(
            run.folder / "quality.json", json.dumps(result["quality"], indent=2, ensure_ascii=False)
        )
        console.print(quality_table(result["quality"]))
    console.print(f"records: {path}\ncard:    {run.folder / 'synthetic-card.json'}")
    return result


def check_filters(filters: Sequence[str]) -> None:
    """Refuses a filter whose outcome would tell something about the private records.

    Example:
      >>> check_filters(["copies"])
      Traceback (most recent call last):
      ...
      dpjax.errors.DpjaxError: filter 'copies' compares samples with the private records, which \
epsilon does not cover; use some of: empty, unfinished, duplicate
    """
    for name in filters:
        if name not in ("empty", "unfinished", "duplicate"):
            why = _REFUSED.get(name, "is not known")
            covered = ", which epsilon does not cover" if name in ("copies", "classifier") else ""
            raise DpjaxError(
                f"filter {name!r} {why}{covered}; use some of: empty, unfinished, duplicate"
            )


def _shares(config: SynthesizeConfig) -> list[float]:
    labels, shares = config.train.labels, config.proportions
    if config.num_samples < 1:
        raise DpjaxError(f"num_samples is {config.num_samples}; use at least 1")
    if shares and (len(shares) != len(labels) or min(shares) < 0 or sum(shares) <= 0):
        raise DpjaxError(
            f"proportions are {list(shares)} for {len(labels)} labels; give one share for each"
        )
    count = max(1, len(labels))
    return [s / sum(shares) for s in shares] if shares else [1 / count] * count


def sample_records(config: SynthesizeConfig, model: Model, key: jax.Array) -> Synthetic:
    """Draws records label by label until enough have passed the filters.

    Reads the model and public settings only, so the records are post-processing of the model.

    Raises:
      DpjaxError: if four times the wanted number were drawn and too few passed.
    """
    train, tokenizer = config.train, model.tokenizer
    labels: list[str | None] = list(train.labels) or [None]
    wanted = _counts(config.num_samples, _shares(config))
    kept: list[list[Record]] = [[] for _ in labels]
    seen: set[tuple[str | None, str]] = set()
    dropped = dict.fromkeys(config.filters, 0)
    length = config.max_new_tokens or train.sequence_length
    drawn = tokens = attempt = 0
    began = time.monotonic()
    while any(len(have) < want for have, want in zip(kept, wanted, strict=True)):
        if drawn > 4 * config.num_samples + 8 * config.sample_batch_size:
            raise DpjaxError(
                f"{drawn} samples were drawn and only {sum(map(len, kept))} of "
                f"{config.num_samples} passed the filters ({', '.join(config.filters)}); train "
                "longer, raise --temperature, or use fewer filters"
            )
        order = [i for i, want in enumerate(wanted) for _ in range(want - len(kept[i]))]
        order = order[: config.sample_batch_size * 16]
        prompts = [_prompt(train, tokenizer, labels[i]) for i in order]
        texts = generate(
            model.config,
            model.params,
            prompts,
            jax.random.fold_in(key, attempt),
            max_new_tokens=length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_token=(tokenizer.eos_id, *tokenizer.stop_ids),
            batch_size=config.sample_batch_size,
        )
        attempt += 1
        for i, ids in zip(order, texts, strict=True):
            drawn += 1
            tokens += len(ids)
            text = tokenizer.decode(ids).strip()
            why = _reason(config.filters, text, len(ids) >= length, (labels[i], text) in seen)
            if why is not None:
                dropped[why] += 1
                continue
            seen.add((labels[i], text))
            kept[i].append(Record(text, None, labels[i]))
    records = [record for have in kept for record in have]
    seconds = time.monotonic() - began
    return Synthetic(records, drawn, {n: c for n, c in dropped.items() if c}, tokens / seconds)


def _counts(total: int, shares: list[float]) -> list[int]:
    """Whole numbers in these shares that sum to the total (largest remainders)."""
    exact = [total * share for share in shares]
    counts = [int(value) for value in exact]
    largest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in largest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _prompt(config: TrainConfig, tokenizer: Tokenizer, label: str | None) -> list[int]:
    if label is None:
        return [tokenizer.bos_id]
    return [tokenizer.bos_id, *tokenizer.encode(prompt_for(config, label))]


def _reason(filters: Sequence[str], text: str, unfinished: bool, repeated: bool) -> str | None:
    found = {"empty": not text, "unfinished": unfinished, "duplicate": repeated}
    return next((name for name in filters if found[name]), None)


def synthetic_card(done: Finished, ledger: Ledger, text: str, count: int) -> dict[str, Any]:
    """The privacy card of the synthetic records: that of the training, released as text."""
    run: Run = done.run
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    inputs = card_inputs(run, ledger, sha256, done.before, done.after)
    inputs = dataclasses.replace(
        inputs,
        released=(
            f"{count} synthetic records, sampled from the final weights: they inherit its epsilon "
            "and delta by post-processing",
        ),
        views=("Y",),
        not_covered=(*inputs.not_covered, "quality.json: compares with private records"),
    )
    return build_card(inputs)


def real_records(run: Run) -> tuple[list[Record], list[Record]]:
    """The records that were trained on and those held out, as text. Private."""
    config = run.config
    records = read_records(config, config.data)
    held = set(run.held_out.record_ids.tolist()) if run.held_out.record_ids is not None else set()
    if config.held_out_data is not None:
        return records, read_records(config, config.held_out_data)
    is_held = [stable_id("record", record.text) in held for record in records]
    training = [r for r, out in zip(records, is_held, strict=True) if not out]
    return training, [r for r, out in zip(records, is_held, strict=True) if out]
