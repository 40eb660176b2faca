"""`dpjax audit`: coins in the training loop, kept by the ledger, guessed from the model."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpjax.artifact import save_model
from dpjax.auditing.coins import coin_canaries, commitment, with_coin_canaries
from dpjax.data import Record, by_user, byte_tokenizer, dataset_from_records, plant_pii
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.models import DecoderConfig, Model
from dpjax.report import read_card
from dpjax.runs import commands
from dpjax.runs.audit import AuditRunConfig, audit_run
from dpjax.runs.audit_model import AuditModelConfig, AuditTextConfig, audit_model, audit_text
from dpjax.runs.config import TrainConfig, make_mechanism
from dpjax.runs.folder import open_run, reopen

SECRET = bytes(range(32))


@pytest.fixture(autouse=True)
def standard_promotion(strict_arithmetic):
    """Optax's Adam multiplies by Python powers of an int32 count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "notes.jsonl"
    rng = np.random.default_rng(0)
    lines = [{"text": f"note {rng.integers(1000)} of the day", "user": f"u{i % 50}"}
             for i in range(120)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(records, folder, **changes):
    fields = {
        "data": str(records),
        "output": str(folder),
        "user_field": "user",
        "sequence_length": 12,
        "iterations": 40,
        "expected_batch_size": 32,
        "microbatch_size": 32,
        "audit_canaries": 100,
        "seed": 0,
        "noise_multiplier": 0.0,
        "l2_clip_norm": math.inf,
        "sampling": "shuffled",
    }
    return TrainConfig(**fields | changes)


def test_coins_follow_from_the_secret_alone():
    first = coin_canaries(SECRET, 1000, byte_tokenizer(), 8)
    again = coin_canaries(SECRET, 1000, byte_tokenizer(), 8)
    other = coin_canaries(SECRET[::-1], 1000, byte_tokenizer(), 8)
    np.testing.assert_array_equal(first.canaries.in_, again.canaries.in_)
    np.testing.assert_array_equal(first.included, again.included)
    assert abs(int(first.included.sum()) - 500) < 64  # four standard deviations
    assert 0.3 < np.mean(first.included == other.included) < 0.7
    # Uniform over the ordinary tokens, from which a model can learn nothing but the canary.
    counts = np.bincount(first.canaries.in_[:, 1:].ravel(), minlength=259)
    assert counts[256:].sum() == 0 and counts[:256].min() > 5 and counts[:256].max() < 60
    assert commitment(SECRET) != commitment(SECRET[::-1]) and SECRET.hex() not in commitment(SECRET)


def test_only_included_canaries_are_in_the_data():
    texts = [Record(f"text {i}", f"u{i}") for i in range(5)]
    data = dataset_from_records(texts, byte_tokenizer(), 8)
    canaries = coin_canaries(SECRET, 50, byte_tokenizer(), 8)
    mixed = with_coin_canaries(data, canaries)
    assert len(mixed) == 5 + canaries.included.sum()
    present = {tuple(row) for row in mixed.tokens.tolist()}
    expected = {tuple(row) for row in canaries.canaries.in_[canaries.included].tolist()}
    assert present == expected | {tuple(row) for row in data.tokens.tolist()}
    assert len(set(mixed.people().tolist())) == len(mixed)
    people = by_user(data, 3)
    of_people = coin_canaries(SECRET, 50, byte_tokenizer(), 8, rows=3)
    mixed = with_coin_canaries(people, of_people)
    assert mixed.tokens.shape == (5 + of_people.included.sum(), 3, 8)
    full = [row for row, mask in zip(mixed.tokens, mixed.loss_mask, strict=True) if mask.all()]
    assert all((row == row[0]).all() for row in full) and len(full) == of_people.included.sum()


def test_sampling_probability_does_not_depend_on_the_coins(records, tmp_path):
    drawn = {
        open_run(config(records, tmp_path / str(seed), seed=seed, noise_multiplier=1.0,
                        l2_clip_norm=1.0, sampling="poisson"), tmp_path / str(seed))
        .mechanism.sampling_probability
        for seed in range(3)
    }  # fmt: skip
    assert len(drawn) == 1
    plan = make_mechanism(TrainConfig(data="x", expected_batch_size=10), 90, 100)
    assert plan.sampling_probability == 0.1 and plan.population == 90


@pytest.fixture(scope="module")
def plain(records, tmp_path_factory):
    """Trained without privacy until it knows the canaries."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    with jax.numpy_dtype_promotion("standard"):
        commands.train(config(records, folder, learning_rate=1e-2, iterations=100))
    return folder


def test_a_model_that_memorised_is_seen_through(plain):
    ledger = plain / "ledger.jsonl"
    before = [json.loads(line) for line in ledger.read_text().splitlines()]
    secret = bytes.fromhex((plain / "audit.secret").read_text().strip())
    assert (plain / "audit.secret").stat().st_mode & 0o077 == 0
    assert before[0]["config"]["audit"] == {"canaries": 100, "commitment": commitment(secret)}
    assert secret.hex() not in ledger.read_text() and "included" not in ledger.read_text()
    done = audit_run(AuditRunConfig(str(plain), guess_fraction=0.5))
    audit = read_card(plain / "card.json")["audit"]
    assert audit == done.card["audit"]
    one_run = audit["bounds"][0]
    assert one_run["method"] == "one_run" and one_run["num_guesses"] == 50
    assert one_run["num_correct"] >= 47 and 1.2 < one_run["epsilon_lower"] < one_run["ceiling"]
    assert audit["claimed_epsilon"] is None and audit["verdict"] == "not falsified"
    (attack,) = audit["attacks"]
    assert attack["num_members"] + attack["num_non_members"] == 100
    area = attack["metrics"][0]
    assert (
        area["metric"] == "auc" and area["low"] > 0.9 and "start model" in attack["assumptions"][0]
    )
    assert "start model" in (plain / "report.html").read_text()
    assert "Audit: not falsified" in (plain / "report.html").read_text()
    # Revealed once, after the end; again with the same coins.
    after = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert after[: len(before)] == before and after[-1]["kind"] == "canaries"
    bits = [bit == "1" for bit in after[-1]["included"]]
    assert bits == reopen(plain).canaries.included.tolist()
    audit_run(AuditRunConfig(str(plain)))
    assert len(ledger.read_text().splitlines()) == len(after)


def test_the_same_run_with_noise_stays_below_its_claim(records, tmp_path):
    folder = tmp_path / "private"
    commands.train(
        config(records, folder, noise_multiplier=4.0, l2_clip_norm=1.0, sampling="poisson",
               iterations=20, learning_rate=1e-2)
    )  # fmt: skip
    done = audit_run(AuditRunConfig(str(folder), guess_fraction=0.5))
    audit = done.card["audit"]
    assert audit["verdict"] == "not falsified"
    assert audit["epsilon_lower"] < audit["claimed_epsilon"]
    area = audit["attacks"][0]["metrics"][0]
    assert area["low"] < 0.6 and area["high"] > 0.4
    assert {b["method"] for b in audit["bounds"]} == {
        "one_run", "one_run_fdp_gaussian", "one_run_fdp_profile", "gaussian_dp"
    }  # fmt: skip
    assert all(b["epsilon_lower"] <= b["ceiling"] for b in audit["bounds"])


def test_a_claim_that_is_not_kept_is_falsified(plain, records, tmp_path):
    """The weights of the run without noise, passed off as those of one with epsilon below 1."""
    folder = tmp_path / "liar"
    commands.train(
        config(records, folder, noise_multiplier=20.0, l2_clip_norm=1.0, sampling="poisson",
               iterations=3)
    )  # fmt: skip
    from dpjax.artifact import load_model, save_model

    sha256 = save_model(folder / "model", load_model(plain / "model"))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"params_sha256": sha256}))
    done = audit_run(AuditRunConfig(str(folder), guess_fraction=0.5))
    assert done.card["audit"]["verdict"] == "FALSIFIED"
    assert done.card["hazards"][0]["code"] == "audit_above_claim"
    page = (folder / "report.html").read_text()
    assert "Audit: FALSIFIED" in page and "contradicts the claim" in page


def test_other_coins_than_promised_are_refused(plain, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    (copy / "audit.secret").write_text("00" * 32 + "\n")
    with pytest.raises(DpjaxError):
        audit_run(AuditRunConfig(str(copy)))
    (copy / "audit.secret").unlink()
    with pytest.raises(DpjaxError, match=r"audit\.secret is missing"):
        audit_run(AuditRunConfig(str(copy)))
    (copy / "audit.secret").write_text("not hex")
    with pytest.raises(DpjaxError, match="is corrupt"):
        audit_run(AuditRunConfig(str(copy)))


def test_a_run_without_canaries_cannot_be_audited(records, tmp_path):
    commands.train(config(records, tmp_path / "none", audit_canaries=0, iterations=1))
    with pytest.raises(DpjaxError, match="--audit-canaries"):
        audit_run(AuditRunConfig(str(tmp_path / "none")))


def test_coins_are_not_revealed_before_the_end(tmp_path):
    mechanism = make_mechanism(TrainConfig(data="x", noise_multiplier=1.0), 1000)
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        run = ledger.start_run(mechanism, 1000, {})
        with pytest.raises(DpjaxError, match="has not ended"):
            ledger.reveal_canaries(run, SECRET, [True])
        ledger.end_run(run, "completed")
        ledger.reveal_canaries(run, SECRET, [True, False])
        ledger.reveal_canaries(run, SECRET, [True, False])
        with pytest.raises(DpjaxError, match="other coins"):
            ledger.reveal_canaries(run, SECRET, [True, True])
        assert ledger.records[-1]["included"] == "10"


@pytest.fixture(scope="module")
def spells(tmp_path_factory):
    """Two files of texts from one distribution, none of them the same."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("spells")
    for name in ("members", "others"):
        texts = ["".join(chr(97 + letter) for letter in rng.integers(26, size=12))
                 for _ in range(120)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"spell {text}", "user": text}) + "\n" for text in texts)
        )
    return folder


@pytest.fixture(scope="module")
def memorised(spells, tmp_path_factory):
    """Trained without privacy until it knows its records."""
    folder = tmp_path_factory.mktemp("runs") / "memorised"
    settings = config(
        spells / "members.jsonl",
        folder,
        learning_rate=1e-2,
        iterations=150,
        audit_canaries=0,
        sequence_length=20,
    )
    with jax.numpy_dtype_promotion("standard"):
        commands.train(settings)
    return folder


def test_attacks_on_a_model_in_one_call(memorised, spells, tmp_path):
    found = audit_model(
        AuditModelConfig(
            str(memorised),
            str(spells / "members.jsonl"),
            str(spells / "others.jsonl"),
            str(tmp_path),
        )
    )
    assert json.loads((tmp_path / "audit.json").read_text()) == found
    by_name = {attack["attack"]: attack["metrics"].get("auc") for attack in found["attacks"]}
    assert set(by_name) == {
        "bag of words, without the model",
        "loss",
        "min_k",
        "min_k_plus_plus",
        "zlib",
        "extraction in 1 query",
        "extraction in 100 queries",
        "extraction in 10,000 queries",
    }
    # It was trained on nine tenths of them, many times over.
    assert by_name["loss"]["low"] > 0.6 and by_name["loss"]["value"] > 0.7
    assert found["covered_by_epsilon"] is False
    figure = (tmp_path / "roc.svg").read_text()
    assert figure.startswith("<?xml") and "blind guess" in figure


def test_planted_secrets_are_attacked_and_compared_with_their_twins(overfit, tmp_path):
    tokenizer = byte_tokenizer()
    _, planted = plant_pii(
        [], repetitions={1: 10}, seed=3, kinds=["phone"], locales=["en_US"], num_held_out_twins=10
    )
    planted.save(tmp_path / "planted.json")
    sides = {"members": planted.inserted, "others": planted.held_out}
    for name, secrets in sides.items():
        lines = [json.dumps({"text": secret.text}) + "\n" for secret in secrets]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=64,
    )  # fmt: skip
    params = overfit(shape, [s.text for s in planted.inserted], 48, 300)
    save_model(tmp_path / "model", Model(shape, params, tokenizer))
    found = audit_model(
        AuditModelConfig(
            str(tmp_path / "model"), str(tmp_path / "members.jsonl"),
            str(tmp_path / "others.jsonl"), str(tmp_path / "audit"),
            planted=str(tmp_path / "planted.json"), num_texts=100,
        )
    )  # fmt: skip
    rates = {a["attack"]: a["metrics"] for a in found["attacks"] if "rate" in a["metrics"]}
    assert len(rates) == 7
    for attack in set(rates) - {"extraction in 1 query", "pii extraction"}:
        assert rates[attack]["rate"]["value"] > 0.8, attack
    for attack, metrics in rates.items():
        assert metrics["rate_on_twins"]["value"] <= 0.1, attack
    inference = next(a for a in found["attacks"] if a["attack"] == "pii inference")
    assert inference["blind_guess"] == 0.01


def test_synthetic_text_is_attacked_alone(spells, tmp_path):
    members = (spells / "members.jsonl").read_text().splitlines()[:60]
    (tmp_path / "leaking.jsonl").write_text("\n".join(members) + "\n")
    (tmp_path / "clean.jsonl").write_text('{"text": "spell of nothing"}\n')
    values = []
    for name in ("leaking", "clean"):
        found = audit_text(
            AuditTextConfig(
                str(tmp_path / f"{name}.jsonl"), str(spells / "members.jsonl"),
                str(spells / "others.jsonl"), str(tmp_path / "out"), text_field="text", nearest=1,
            )
        )  # fmt: skip
        assert all(a["threat_view"] == "Y" for a in found["attacks"][1:])
        values.append([a["metrics"]["auc"]["value"] for a in found["attacks"][1:]])
    assert min(values[0]) == pytest.approx(0.75, abs=0.01)  # half of the members stand there
    assert values[1] == [0.5, 0.5]


def test_a_text_on_both_sides_is_refused(plain, records, tmp_path):
    with pytest.raises(DpjaxError, match="are in both"):
        audit_model(AuditModelConfig(str(plain), str(records), str(records), str(tmp_path)))


def test_the_command_line_names_every_audit(tmp_path):
    def dpjax(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dpjax.cli", "audit", *arguments], capture_output=True, text=True
        )

    shown = dpjax("--help").stdout
    assert all(name in shown for name in ("model", "run", "step"))
    missing = dpjax("run", str(tmp_path / "nowhere"))
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1
    few = dpjax("step", "--num-runs", "3")
    assert few.returncode == 2 and "num_runs is 3" in few.stderr
