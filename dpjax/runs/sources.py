"""Records, models and examples that a configuration names."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax

from dpjax.artifact import is_model_folder, load_model
from dpjax.data import (
    Dataset,
    Record,
    Tokenizer,
    UserDataset,
    by_user,
    byte_tokenizer,
    chitchat,
    dataset_from_records,
    load_tokenizer,
    records_from,
    shakespeare,
    train_bpe,
)
from dpjax.errors import DpjaxError
from dpjax.models import (
    Model,
    bundled_names,
    combine,
    decoder_config,
    init_params,
    is_pretrained_source,
    load_pretrained,
    prepare_tuning,
)
from dpjax.runs.config import PRESETS, TrainConfig, tuning_of
from dpjax.types import PyTree


def public_bpe(vocabulary_size: int = 1024) -> Tokenizer:
    """Byte-level BPE trained on the bundled Shakespeare plays, which are public."""
    texts = [record.text for record in shakespeare()]
    return train_bpe(texts, vocabulary_size, tokenizer_corpus="public")


def public_plays() -> list[Record]:
    """Shakespeare in records of about 64 tokens: consecutive speeches of a play, joined.

    Example:
      >>> records = public_plays()
      >>> len(records) > 10_000, len(records[0].text) > 200
      (True, True)
    """
    joined: list[Record] = []
    current, current_play = "", ""
    for speech in shakespeare():
        play = (speech.user or "").partition("/")[0]
        if current and (play != current_play or len(current) > 230):
            joined.append(Record(current, current_play))
            current = ""
        current_play = play
        current += ("\n" if current else "") + speech.text
    return [*joined, Record(current, current_play)]


BUNDLED = {"chitchat": chitchat, "shakespeare": public_plays}


def read_records(config: TrainConfig, source: str) -> list[Record]:
    """Records of a file, folder, hub id or bundled source."""
    if source in BUNDLED:
        return BUNDLED[source]()
    return records_from(
        source, config.text_field, config.user_field, label_field=config.label_field
    )


class Start(NamedTuple):
    """The model before training, and which part of it training may change."""

    model: Model  # whole, adapters included
    trainable: PyTree  # the model's structure with None where frozen
    frozen: PyTree  # the opposite


def open_model(source: str) -> Model:
    """A model to read: a model folder, a run folder with one in it, or anything pretrained.

    Example:
      >>> open_model("smollm2").config.num_layers
      30
    """
    path = pathlib.Path(source)
    if (path / "run.json").exists():
        path = path / "model"
    if is_model_folder(path) or (path.exists() and not is_pretrained_source(path)):
        return load_model(path)
    return load_pretrained(source)


def starting_point(config: TrainConfig, key: jax.Array) -> Start:
    """The model that a configuration starts from, divided into what is trained and what stays."""
    model_key, adapter_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
    model = _starting_model(config, model_key)
    computed = {"remat": config.remat, "compute_dtype": config.compute_dtype}
    if config.compute_dtype == model.config.dtype:
        computed["compute_dtype"] = None
    shape, trainable, frozen = prepare_tuning(
        dataclasses.replace(model.config, **computed),
        model.params,
        tuning_of(config),
        lora=config.lora,
        last_layers=config.last_layers,
        key=adapter_key,
    )
    whole = model._replace(config=shape, params=combine(trainable, frozen))
    return Start(whole, trainable, frozen)


def _starting_model(config: TrainConfig, key: jax.Array) -> Model:
    chosen = config.tokenizer
    if config.model not in PRESETS:
        if not pathlib.Path(config.model).exists() and not is_pretrained_source(config.model):
            raise DpjaxError(
                f"model {config.model!r} is neither a preset ({', '.join(PRESETS)}), nor bundled "
                f"({', '.join(bundled_names())}), nor a folder, a .gguf file or a hub id"
            )
        if chosen != "auto":
            raise DpjaxError(
                f"tokenizer is {chosen!r}, but {config.model} brings its own; leave it at 'auto'"
            )
        return open_model(config.model)
    if chosen in ("auto", "bytes"):
        tokenizer = byte_tokenizer()
    elif chosen == "shakespeare":
        tokenizer = public_bpe()
    else:
        tokenizer = load_tokenizer(chosen)
    shape = decoder_config(config.model, tokenizer.vocabulary_size)  # type: ignore[arg-type]
    return Model(shape, init_params(shape, key), tokenizer)


def prompts_of(config: TrainConfig, records: list[Record]) -> list[str] | None:
    """What stands in front of each record, or None where records have no labels.

    Raises:
      DpjaxError: labels without a field, a record without a listed label, or no {label} in prompt.
    """
    if config.label_field is None:
        if config.labels:
            raise DpjaxError("labels are given without label_field; name the field that holds them")
        return None
    if not config.labels:
        raise DpjaxError(
            "labels is empty; list every label there may be (--labels a b c): a list read from the "
            "records would tell who is in them"
        )
    if "{label}" not in config.prompt:
        raise DpjaxError(f"prompt is {config.prompt!r}; it must hold {{label}}")
    for index, record in enumerate(records):
        if record.label not in config.labels:
            raise DpjaxError(
                f"record {index} has a label that is not among --labels; add it, or drop the record"
            )
    return [prompt_for(config, record.label) for record in records]


def prompt_for(config: TrainConfig, label: str | None) -> str:
    """The control code of a label.

    Example:
      >>> prompt_for(TrainConfig(data="x"), "refund")
      'refund: '
    """
    return config.prompt.replace("{label}", str(label))


def make_datasets(
    config: TrainConfig, tokenizer: Tokenizer
) -> tuple[Dataset | UserDataset, Dataset]:
    """Training and held-out examples; nobody is in both (with ``held_out``)."""

    def read(source: str) -> Dataset:
        records = read_records(config, source)
        name = pathlib.Path(source).name
        prompts = prompts_of(config, records)
        return dataset_from_records(
            records, tokenizer, config.sequence_length, name=name, prompts=prompts
        )

    training = read(config.data)
    if config.held_out_data is not None:
        held_out = read(config.held_out_data)
    elif 0 < config.held_out < 1:
        # The split depends on public things alone, so it is the same for every trial.
        training, held_out = training.split(config.held_out, seed=0)
    else:
        raise DpjaxError(f"held_out is {config.held_out}; it must be a share in (0, 1), e.g. 0.1")
    if config.max_examples_per_user is not None and not config.pack:
        training = training.bound_contributions(config.max_examples_per_user, seed=0)
    for name, part in (("training", training), ("held-out", held_out)):
        if len(part) == 0:
            raise DpjaxError(
                f"the {name} part of {config.data} has no records; give more records or another "
                "--held-out share"
            )
    if config.unit == "user":
        return _people(config, training), held_out
    if config.pack:
        raise DpjaxError(
            "pack joins one person's records; give --unit user with it (rows shared by people "
            "would shift when one of them is removed)"
        )
    return training, held_out


def _people(config: TrainConfig, training: Dataset) -> UserDataset:
    if config.user_field is None and config.data not in BUNDLED:
        raise DpjaxError("unit is 'user' without user_field; name the field with the person's id")
    if config.max_examples_per_user is None:
        raise DpjaxError(
            "unit is 'user' without max_examples_per_user; say how many rows a person may fill, "
            "e.g. 4"
        )
    if config.pack and config.label_field is not None:
        raise DpjaxError("pack cannot join labelled records; leave out --pack or --label-field")
    return by_user(training, config.max_examples_per_user, pack=config.pack)
