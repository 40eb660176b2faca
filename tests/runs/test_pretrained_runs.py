"""Runs from a pretrained folder: tuned parts, resume, people as units, export, synthesis."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from dpjax.artifact import load_model
from dpjax.data import (
    DOMAIN_LABELS,
    Record,
    Tokenizer,
    by_user,
    byte_tokenizer,
    dataset_from_records,
    domain_records,
    write_domain_records,
)
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.models import (
    LoRA,
    Model,
    apply,
    count_parameters,
    decoder_config,
    init_params,
    load_pretrained,
    save_pretrained,
    with_segments,
)
from dpjax.report.files import read_card
from dpjax.runs.commands import _continued, drive, export, finished_run, train
from dpjax.runs.config import TrainConfig
from dpjax.runs.folder import create, open_run, reopen
from dpjax.runs.predict import PredictConfig, predict
from dpjax.runs.synthesize import SynthesizeConfig, _counts, synthesize

LABELS = DOMAIN_LABELS["medical"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pretrained model in Hugging Face's format, and labelled private records."""
    path = tmp_path_factory.mktemp("pretrained")
    tokenizer = byte_tokenizer()
    config = decoder_config("nano", tokenizer.vocabulary_size, num_layers=2, d_model=32, d_ff=48)
    params = init_params(config, jax.random.key(0))
    save_pretrained(path / "model", Model(config, params, tokenizer))
    write_domain_records(path / "notes.jsonl", domain_records("medical", 120, seed=0))
    return path


def configuration(folder, output, **changes):
    settings = {
        "data": str(folder / "notes.jsonl"),
        "output": str(output),
        "user_field": "user",
        "model": str(folder / "model"),
        "lora": LoRA(2, targets=("query", "up")),
        "sequence_length": 24,
        "iterations": 3,
        "expected_batch_size": 32,
        "microbatch_size": 8,
        "checkpoint_every": 1,
        "seed": 3,
        **changes,
    }
    return TrainConfig(**settings)


def test_a_pretrained_folder_is_tuned_by_adapters_and_exported(folder, tmp_path, monkeypatch):
    config = configuration(folder, tmp_path / "run")
    train(config)
    before, after = load_pretrained(folder / "model"), load_model(tmp_path / "run" / "model")
    assert after.config.lora == config.lora
    run = reopen(tmp_path / "run")
    assert count_parameters(run.point.trainable) == 2 * 2 * ((32 + 32) + (32 + 48))
    # What is frozen is bitwise what it was; what is trained has moved.
    stacked = after.params["blocks"][0]["attention"]["query"]
    np.testing.assert_array_equal(
        stacked["kernel"], before.params["blocks"][0]["attention"]["query"]["kernel"]
    )
    assert float(jnp.abs(stacked["lora_b"]).max()) > 1e-4
    card = read_card(tmp_path / "run" / "card.json")
    assert "LoRA of rank 2" in card["training"]["model_name"]
    assert card["training"]["num_trained_parameters"] == 576

    export(str(tmp_path / "run"), str(tmp_path / "exported"), False, None)
    again = load_pretrained(tmp_path / "exported")
    tokens = jnp.arange(20)
    np.testing.assert_allclose(
        apply(again.config, again.params, tokens),
        apply(after.config, after.params, tokens),
        atol=1e-5,
    )
    assert again.tokenizer.encode("hé") == byte_tokenizer().encode("hé")
    export(str(tmp_path / "run"), str(tmp_path / "adapter"), True, "base")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["base_model_name_or_path"]) == (2, "base")
    with pytest.raises(DpjaxError, match="not empty"):
        export(str(tmp_path / "run"), str(tmp_path / "adapter"), True, None)


def test_a_stopped_tuning_run_ends_as_if_it_had_not_been(folder, tmp_path):
    whole = finished_run(configuration(folder, tmp_path / "whole"))
    run = open_run(configuration(folder, tmp_path / "stopped"), tmp_path / "stopped")
    create(run)
    from dpjax.runs.execute import execute

    with Ledger.open(run.ledger_path) as ledger:
        for step in execute(run, ledger):
            if step.iteration == 2:
                break
    resumed = finished_run(configuration(folder, tmp_path / "stopped"))
    for a, b in zip(
        jax.tree.leaves(whole.model.params), jax.tree.leaves(resumed.model.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_changed_base_model_is_not_resumed(folder, tmp_path):
    base = load_pretrained(folder / "model")
    save_pretrained(tmp_path / "base", base)
    config = configuration(folder, tmp_path / "run", model=str(tmp_path / "base"))
    finished_run(config)
    changed = jax.tree.map(lambda x: x * 1.01, base.params)
    save_pretrained(tmp_path / "base", base._replace(params=changed))
    with pytest.raises(DpjaxError, match="frozen_sha256"):
        reopen(tmp_path / "run")


@pytest.mark.parametrize("tuning", ["full", "last_layers"])
def test_other_parts_can_be_tuned(folder, tmp_path, tuning):
    config = configuration(folder, tmp_path, tuning=tuning, last_layers=1, iterations=1, remat=True)
    run = open_run(config, tmp_path)
    create(run)
    with Ledger.open(run.ledger_path) as ledger:
        state = drive(run, ledger, "tuned", quiet=True)
    moved = [
        float(jnp.abs(a - b).max()) > 0
        for a, b in zip(
            jax.tree.leaves(run.point.trainable), jax.tree.leaves(state.params), strict=True
        )
    ]
    assert all(moved)
    share = count_parameters(run.point.trainable) / count_parameters(run.start.params)
    assert (share == 1) == (tuning == "full")


def test_biases_are_refused_where_there_are_none(folder, tmp_path):
    with pytest.raises(DpjaxError, match="use lora"):
        open_run(configuration(folder, tmp_path, tuning="bias"), tmp_path)


def test_one_gradient_is_one_persons(folder, tmp_path):
    config = configuration(
        folder, tmp_path, unit="user", max_examples_per_user=2, iterations=1, expected_batch_size=8
    )
    done = finished_run(config)
    people = {r.user for r in domain_records("medical", 120, seed=0)}
    assert len(done.run.training) + len(set(done.run.held_out.people())) == len(people)
    assert done.card["claim"]["unit"].startswith("one person")
    assert done.card["claim"]["max_units_per_person"] == 1
    assert done.run.training.take([0])["tokens"].shape == (1, 2, 24)


def test_a_persons_example_depends_on_that_person_alone():
    tokenizer = byte_tokenizer()
    records = [Record(f"note {i} of {i % 3}", f"user {i % 3}") for i in range(9)]
    whole = by_user(dataset_from_records(records, tokenizer, 12), 2)
    without = by_user(
        dataset_from_records([r for r in records if r.user != "user 1"], tokenizer, 12), 2
    )
    np.testing.assert_array_equal(whole.tokens[[0, 2]], without.tokens)
    packed = by_user(dataset_from_records(records, tokenizer, 12), 2, pack=True)
    assert packed.loss_mask.all()  # three records of 12 tokens fill two rows of 12
    first = [*packed.tokens[0].reshape(-1)[:24]]
    assert first == [
        t for r in records if r.user == "user 0"
        for t in [tokenizer.bos_id, *tokenizer.encode(r.text), tokenizer.eos_id][:12]
    ][:24]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "user"}, "max_examples_per_user"),
        ({"unit": "user", "user_field": None, "max_examples_per_user": 2}, "without user_field"),
        ({"pack": True}, "--unit user"),
        ({"labels": ("a",)}, "without label_field"),
        ({"label_field": "label"}, "labels is empty"),
        ({"label_field": "label", "labels": ("x",)}, "not among --labels"),
        ({"label_field": "label", "labels": LABELS, "prompt": "x"}, "must hold {label}"),
        ({"label_field": "label", "labels": LABELS, "sequence_length": 8}, "leaves no room"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"model": "nothing"}, "neither a preset"),
        ({"tokenizer": "bytes"}, "brings its own"),
        ({"lora": {"rank": 0}}, "lora rank is 0"),
    ],
)
def test_contradictions_get_one_line(folder, tmp_path, changes, words):
    with pytest.raises(DpjaxError) as caught:
        if isinstance(changes.get("lora"), dict):
            LoRA(**changes["lora"])
        open_run(configuration(folder, tmp_path, **changes), tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def synthetic(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("synthetic") / "run"
    train_config = configuration(
        folder, output, label_field="label", labels=LABELS, tuning="full", sequence_length=40
    )
    config = SynthesizeConfig(
        train_config, num_samples=12, proportions=(3, 1, 1, 1, 0), filters=("empty",)
    )
    return config, output, synthesize(config)


def test_synthetic_records_carry_the_card_of_their_training(synthetic):
    _, output, result = synthetic
    rows = [json.loads(line) for line in (output / "synthetic.jsonl").read_text().splitlines()]
    assert [r["label"] for r in rows] == [LABELS[i] for i in [0] * 6 + [1, 1, 2, 2, 3, 3]]
    assert all(set(r) == {"text", "label"} for r in rows)
    training, card = read_card(output / "card.json"), read_card(output / "synthetic-card.json")
    assert card["claim"]["epsilon"] == training["claim"]["epsilon"] <= 8
    assert card["claim"]["delta"] == training["claim"]["delta"]
    assert "post-processing" in card["released"]["what"][0]
    assert card["identity"]["artifact_sha256"] != training["identity"]["artifact_sha256"]
    assert result["quality"]["covered_by_epsilon"] is False
    assert {"downstream", "statistics", "copies"} <= set(result["quality"])


def test_prompts_are_read_but_not_predicted(synthetic):
    config, output, _ = synthetic
    training = reopen(output).training
    row = training.tokens[0]
    text = byte_tokenizer().decode(row)
    label = next(label for label in LABELS if text.startswith(f"{label}: "))
    first = 1 + len(f"{label}: ")
    assert not training.loss_mask[0, :first].any() and training.loss_mask[0, first:].all()


def test_asking_again_trains_nothing(synthetic):
    config, output, _ = synthetic
    before = (output / "ledger.jsonl").read_bytes()
    synthesize(dataclasses.replace(config, num_samples=3, quality=False))
    assert (output / "ledger.jsonl").read_bytes() == before
    with pytest.raises(DpjaxError, match="another configuration"):
        synthesize(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=4)))


@pytest.mark.parametrize("name", ["copies", "classifier", "unheard of"])
def test_filters_that_read_private_records_are_refused(synthetic, name):
    config, _, _ = synthetic
    with pytest.raises(DpjaxError, match=f"filter '{name}'"):
        synthesize(dataclasses.replace(config, filters=("empty", name)))


def test_a_continuation_keeps_its_space():
    """Where every text begins with a space that is not shown, as in Llama 2's tokenizer."""
    pieces = {"\u2581a": 0, "\u2581cat": 1, "s": 2, "<s>": 3, "</s>": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    parts = tokenizers.decoders
    backend.decoder = parts.Sequence(
        [parts.Replace("\u2581", " "), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(backend, pad_id=4, bos_id=3, eos_id=4, corpus="public")
    assert tokenizer.decode([1, 2]) == "cats"
    assert _continued(tokenizer, "a", [3, 0], [1, 2]) == "a cats"
    assert _continued(tokenizer, "", [3], [1, 2]) == "cats"


def test_shares_become_whole_numbers():
    assert _counts(10, [1 / 3] * 3) == [4, 3, 3]
    assert _counts(7, [0.5, 0.5, 0.0]) == [4, 3, 0]
    assert sum(_counts(1000, [0.17, 0.23, 0.6])) == 1000


def test_private_prediction_from_the_command(folder, tmp_path):
    config = PredictConfig(
        data=str(folder / "notes.jsonl"),
        output=str(tmp_path / "texts"),
        model=str(folder / "model"),
        label_field="label",
        labels=LABELS,
        num_samples=6,
        records_per_text=4,
        max_record_tokens=12,
        max_new_tokens=5,
        seed=0,
    )
    claim = predict(config)
    rows = [
        json.loads(r) for r in (tmp_path / "texts" / "synthetic.jsonl").read_text().splitlines()
    ]
    assert [r["label"] for r in rows] == [*LABELS, LABELS[0]]
    assert 7.5 < claim["epsilon"] <= 8.0
    with pytest.raises(DpjaxError, match="already holds"):
        predict(config)


def test_stacked_layers_train_like_separate_ones(folder, tmp_path):
    """The same run from a model folder with layers apart gives the same numbers."""
    base = load_pretrained(folder / "model")
    config, params = with_segments(base.config, base.params, ())
    from dpjax.artifact import save_model

    save_model(tmp_path / "apart", base._replace(config=config, params=params))
    stacked = finished_run(configuration(folder, tmp_path / "a", tuning="full"))
    apart = finished_run(
        configuration(folder, tmp_path / "b", tuning="full", model=str(tmp_path / "apart"),
                      learning_rate=2e-4)
    )  # fmt: skip
    assert stacked.after.nats_per_token == pytest.approx(apart.after.nats_per_token, abs=0.02)
    assert pathlib.Path(tmp_path / "a" / "card.json").exists()
