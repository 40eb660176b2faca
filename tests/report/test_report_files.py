"""The schema refuses what is not a card; files are whole or not there."""

import copy
import json
import math
import os

import jsonschema
import pytest

from dpjax.errors import DpjaxError
from dpjax.report import card_schema, read_card, validate_card, write_card

REQUIRED = [
    "identity.card_version",
    "identity.artifact_sha256",
    "setting.model",
    "setting.trust",
    "claim.mechanism",
    "claim.unit",
    "claim.max_units_per_person",
    "claim.neighboring_relation",
    "claim.epsilon",
    "claim.delta",
    "claim.bound_type",
    "coverage.data_accesses_covered",
    "coverage.not_covered",
    "coverage.tuning",
    "released.what",
    "accounting.accountant",
    "accounting.sampling_assumed",
    "accounting.sampling_actual",
    "accounting.match",
    "accounting.dataset_size",
    "accounting.steps_planned",
    "accounting.steps_executed",
    "training.clipping",
    "training.noise_multiplier",
    "training.normalize_by",
    "randomness.generator",
    "randomness.key_secrecy",
    "data.preprocessing",
    "audit.performed",
    "audit.epsilon_lower",
    "audit.verdict",
    "software.package",
    "hazards",
]


def changed(card, path, value):
    broken = copy.deepcopy(card)
    *parents, last = path.split(".")
    inside = broken
    for name in parents:
        inside = inside[name]
    inside[last] = value
    return broken


def removed(card, path):
    broken = copy.deepcopy(card)
    *parents, last = path.split(".")
    inside = broken
    for name in parents:
        inside = inside[name]
    del inside[last]
    return broken


def refused(card, fragment=""):
    with pytest.raises(DpjaxError) as caught:
        validate_card(card)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_the_schema_is_itself_valid():
    jsonschema.Draft202012Validator.check_schema(card_schema())


def objects(schema):
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for child in schema.values():
            yield from objects(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from objects(child)


def test_every_object_in_the_schema_is_closed():
    for schema in objects(card_schema()):
        assert schema.get("additionalProperties") not in (None, True), schema


@pytest.mark.parametrize("path", REQUIRED)
def test_required_fields_are_required(private_card, path):
    refused(removed(private_card, path), path.rsplit(".", 1)[-1])


@pytest.mark.parametrize("path", ["surprise", "claim.surprise", "accounting.surprise"])
def test_unknown_fields_are_refused(private_card, path):
    refused(changed(private_card, path, 1), "surprise")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("identity.card_version", "0.9"),
        ("identity.artifact_sha256", "zz"),
        ("identity.created", "yesterday"),
        ("claim.epsilon", -1.0),
        ("claim.epsilon", "8"),
        ("claim.epsilon", math.inf),
        ("claim.epsilon_pld", math.nan),
        ("claim.delta", 0),
        ("claim.delta", 1.0),
        ("claim.delta_below_one_over_n", False),
        ("claim.unit", ""),
        ("claim.bound_type", "none"),
        ("claim.bound_type", "proven"),
        ("claim.neighboring_relation", "adjacent"),
        ("accounting.match", False),
        ("accounting.match", None),
        ("accounting.steps_executed", 19),
        ("accounting.steps_within_plan", False),
        ("accounting.steps_planned", 19),
        ("accounting.sampling_assumed", {"sampling": "guess"}),
        ("training.noise_multiplier", 0),
        ("audit.verdict", "verified"),
        ("audit.verdict", "not falsified"),
        ("audit.epsilon_lower", 0.5),
        ("audit.performed", True),
        ("hazards", [{"code": "x", "severity": "mild", "text": "y"}]),
    ],
)
def test_a_broken_card_is_refused(private_card, path, value):
    refused(changed(private_card, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("claim.epsilon", 0),
        ("claim.epsilon", 8.0),
        ("claim.epsilon_rdp", 8.0),
        ("claim.total.epsilon", 8.0),
        ("claim.epsilon_in_words", "0"),
        ("claim.statement", "All is well."),
        ("claim.bound_type", "upper"),
        ("claim.privacy_profile", [{"delta": 1e-5, "epsilon_rdp": 1.0, "epsilon_pld": None}]),
    ],
)
def test_a_card_without_a_guarantee_claims_nothing(void_card, path, value):
    validate_card(void_card)
    refused(changed(void_card, path, value))


@pytest.mark.parametrize("value", [None, [], "card", 3])
def test_other_json_is_refused(value):
    refused(value, "top level")


def test_round_trip(private_card, tmp_path):
    path = tmp_path / "deep" / "card.json"
    card = changed(private_card, "claim.unit", "一条消息")
    write_card(card, path)
    assert read_card(path) == card
    text = path.read_text(encoding="utf-8")
    assert "一条消息" in text and text.endswith("}\n")
    assert text == json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_card(private_card, path)
    assert read_card(path) == private_card
    assert os.listdir(path.parent) == ["card.json"]


def test_an_invalid_card_leaves_the_old_file(private_card, tmp_path):
    path = tmp_path / "card.json"
    write_card(private_card, path)
    with pytest.raises(DpjaxError):
        write_card(changed(private_card, "claim.epsilon", math.nan), path)
    assert read_card(path) == private_card


def test_a_failed_write_leaves_the_old_file(private_card, tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    write_card(private_card, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DpjaxError, match="No space left"):
        write_card(changed(private_card, "claim.unit", "one letter"), path)
    monkeypatch.undo()
    assert read_card(path) == private_card
    assert os.listdir(tmp_path) == ["card.json"]


def test_a_folder_that_is_a_file(private_card, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DpjaxError, match="cannot be written"):
        write_card(private_card, tmp_path / "file" / "card.json")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "does not exist"),
        (b"{", "is corrupt"),
        (b"", "is corrupt"),
        (b"\xff\xfe", "is corrupt"),
        (b'{"claim": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "is corrupt"),
        (b"[]", "invalid"),
        (b"{}", "invalid"),
    ],
)
def test_reading_bad_files_gets_one_line(tmp_path, content, fragment):
    path = tmp_path / "card.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DpjaxError) as caught:
        read_card(path)
    assert fragment in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_a_folder(tmp_path):
    with pytest.raises(DpjaxError, match="cannot be read"):
        read_card(tmp_path)
