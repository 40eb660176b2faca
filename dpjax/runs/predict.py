"""`dpjax predict`: synthetic records at inference time, no training, accounted token by token."""

import dataclasses
import json
import os
import pathlib
import time

from dpjax import accounting
from dpjax.data import Record, records_from
from dpjax.errors import DpjaxError
from dpjax.private_prediction import (
    PrivatePrediction,
    assign_batches,
    longest_prompt,
    predict_texts,
    prompt_private,
    prompt_public,
)
from dpjax.report.files import write_whole
from dpjax.runs.commands import console
from dpjax.runs.config import default_delta, fresh_key
from dpjax.runs.sources import open_model


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Write synthetic records by private prediction: a pretrained model reads private records, many
    per text, and only their noisy consensus is written. Nothing is trained."""

    data: str
    """Private records, as for `dpjax train`."""
    output: str = "runs/predict"
    """Folder for synthetic.jsonl and claim.json; must not hold a claim."""
    model: str = "smollm2"
    """A pretrained model, as for `dpjax train`."""
    text_field: str | None = None
    """Field with the text."""
    label_field: str | None = None
    """Field with the label; a text is then written from the records of one label."""
    labels: tuple[str, ...] = ()
    """Every label there may be."""
    num_samples: int = 20
    """Texts. The records are divided among them, and each record is read for one text only."""
    records_per_text: int = 64
    """Expected records behind one text, as a public constant: the more, the less noise. About
    records / (samples x labels)."""
    max_record_tokens: int = 64
    """Of each private record."""
    max_new_tokens: int = 64
    """Of each text; every one is paid for, whether it is written or not."""
    temperature: float = 1.0
    """Above 0: the drawing is the noise."""
    target_epsilon: float = 8.0
    """Privacy budget in nats, for all texts together; it sets how far a record may move a logit."""
    target_delta: float | None = None
    """Failure probability (default: n^-1.1, rounded down)."""
    public_top_k: int | None = 100
    """Only tokens among the likeliest so many without any record."""
    private_prompt: str = "Here is a text:\n{record}\n\nHere is another text of the same kind:\n"
    """What surrounds a private record; {label} may stand in it."""
    public_prompt: str = "Here is a text:\n"
    """The same without a record; {label} may stand in it."""
    seed: int | None = None
    """Fixes all randomness, for research; default: fresh and secret."""


def predict(config: PredictConfig) -> dict[str, object]:
    """Divides the records among the texts, writes them, and says what holds."""
    folder = pathlib.Path(config.output)
    if (folder / "claim.json").exists():
        raise DpjaxError(f"{folder} already holds texts and a claim; choose another --output")
    if config.num_samples < 1:
        raise DpjaxError(f"num_samples is {config.num_samples}; use at least 1")
    if (config.label_field is None) != (not config.labels):
        raise DpjaxError(
            f"label_field is {config.label_field!r} with labels {list(config.labels)}; give both "
            "or neither"
        )
    if "{record}" not in config.private_prompt:
        raise DpjaxError(f"private_prompt is {config.private_prompt!r}; it must hold {{record}}")
    records = records_from(config.data, config.text_field, label_field=config.label_field)
    delta = default_delta(len(records)) if config.target_delta is None else config.target_delta
    accounting.check_delta(delta, len(records))
    mechanism = PrivatePrediction(
        config.records_per_text,
        config.max_new_tokens,
        config.temperature,
        target_epsilon=config.target_epsilon,
        target_delta=delta,
        public_top_k=config.public_top_k,
    )
    model = open_model(config.model)
    tokenizer = model.tokenizer
    labels: list[str | None] = list(config.labels) or [None]
    wanted = [labels[i % len(labels)] for i in range(config.num_samples)]
    private: list[list[list[int]]] = [[] for _ in wanted]
    # Public randomness: which text a record is read for must depend on that record alone.
    batches = assign_batches([r.text for r in records], config.num_samples, config.seed or 0)
    for record, batch in zip(records, batches.tolist(), strict=True):
        if record.label == wanted[batch]:
            template = _filled(config.private_prompt, wanted[batch])
            private[batch].append(
                prompt_private(tokenizer, record.text, config.max_record_tokens, template)
            )
    public = [prompt_public(tokenizer, _filled(config.public_prompt, label)) for label in wanted]
    longest = max(
        longest_prompt(tokenizer, config.max_record_tokens, _filled(config.private_prompt, label))
        for label in labels
    )
    epsilon = mechanism.epsilon(delta)
    console.print(
        f"epsilon {epsilon:.3f} (RDP) at delta {delta:g} for all {config.num_samples} texts: a "
        f"record moves a logit by at most {mechanism.sensitivity:.3g} "
        f"(clip {mechanism.sensitivity * config.records_per_text:.3g} / {config.records_per_text})"
    )
    began = time.monotonic()
    texts = predict_texts(
        model.config,
        model.params,
        mechanism,
        private,
        public,
        fresh_key(config.seed),
        max_prompt_tokens=max(longest, *map(len, public)),
        stop_token=(tokenizer.eos_id, *tokenizer.stop_ids),
    )
    seconds = time.monotonic() - began
    written = [
        Record(tokenizer.decode(text).strip(), None, label)
        for text, label in zip(texts, wanted, strict=True)
    ]
    claim = {
        "mechanism": "private prediction: clipped differences of logits, aggregated, one draw per "
        "token",
        "epsilon": epsilon,
        "delta": delta,
        "accountant": "rdp",
        "zcdp_per_token": mechanism.zcdp_per_token,
        "unit": f"one record of {pathlib.Path(config.data).name}, cut to "
        f"{config.max_record_tokens} tokens",
        "neighboring_relation": mechanism.neighboring_relation.name.lower(),
        "statement": f"The {len(written)} texts together are ({epsilon:.3f}, {delta:g})-"
        "differentially private for one record: each record is read for one text only. Another "
        "call on the same records adds its own epsilon.",
        "key_is_published": config.seed is not None,
        "not_covered": ["floating-point rounding and running time", "the number of records"],
        "pretraining": list(model.pretraining),
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "output"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        json.dumps({"text": r.text, "label": r.label}, ensure_ascii=False) + "\n" for r in written
    )
    write_whole(folder / "synthetic.jsonl", lines)
    write_whole(folder / "claim.json", json.dumps(claim, indent=2, ensure_ascii=False) + os.linesep)
    count = sum(map(len, texts))
    console.print(f"{len(written)} texts, {count / seconds:,.1f} tokens/s with compilation")
    console.print(f"records: {folder / 'synthetic.jsonl'}\nclaim:   {folder / 'claim.json'}")
    return claim


def _filled(template: str, label: str | None) -> str:
    return template.replace("{label}", "" if label is None else label)
