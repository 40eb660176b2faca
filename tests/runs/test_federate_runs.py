"""`dpjax federate`: from records to a card, killed and resumed, changed and refused."""

import dataclasses
import json
import pathlib

import jax
import pytest

from dpjax.artifact import Model, save_model
from dpjax.checkpoint import digest
from dpjax.data import byte_tokenizer
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.models import DecoderConfig, LoRA, combine, init_params
from dpjax.report import read_card
from dpjax.runs.commands import describe, drive
from dpjax.runs.execute import execute
from dpjax.runs.federation import FederateConfig, base_config
from dpjax.runs.finish import finish, refresh
from dpjax.runs.folder import create, open_run, reopen

RECORDS = [
    {"text": f"note {i}: stable, pulse {60 + i % 40}", "patient": i // 3, "ward": "ab"[i % 2]}
    for i in range(90)
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """One narrow layer, and thirty people: what is tested here is the run."""
    folder = tmp_path_factory.mktemp("federate")
    tokenizer = byte_tokenizer()
    shape = DecoderConfig(
        vocabulary_size=tokenizer.vocabulary_size, num_layers=1, d_model=8, num_heads=1,
        num_kv_heads=1, d_ff=8,
    )  # fmt: skip
    save_model(folder / "tiny", Model(shape, init_params(shape, jax.random.key(0)), tokenizer))
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    (folder / "notes.jsonl").write_text("".join(lines), encoding="utf-8")
    return FederateConfig(
        data=str(folder / "notes.jsonl"),
        output=str(folder / "run"),
        user_field="patient",
        model=str(folder / "tiny"),
        sequence_length=16,
        algorithm="scaffold",
        iterations=4,
        cohort_size=8,
        max_examples_per_client=3,
        local_batch_size=2,
        adaptive_quantile=0.5,
        checkpoint_every=2,
        seed=3,
    )


def opened(config):
    return open_run(base_config(config), pathlib.Path(config.output), config)


def whole_state(run, limit=None):
    with Ledger.open(run.ledger_path) as ledger:
        steps = execute(run, ledger)
        for step in steps:
            if limit is not None and step.iteration == limit:
                steps.close()  # as a kill would: nothing after this round is saved
                break
        return step.state


@pytest.fixture(scope="module")
def finished(config):
    run = opened(config)
    create(run)
    with Ledger.open(run.ledger_path) as ledger:
        state = drive(run, ledger, "run", quiet=True)
        return run, state, finish(run, ledger, state)


def test_resume_is_bitwise_the_run_that_never_stopped(config, finished, tmp_path):
    """Also of the clients' control variates, the adaptive norm, the noise and the cohorts."""
    run, state, _ = finished
    broken = opened(dataclasses.replace(config, output=str(tmp_path / "run")))
    create(broken)
    whole_state(broken, limit=3)  # after the checkpoint at 2
    again = whole_state(reopen(broken.folder))
    assert int(again.iteration) == 4
    assert digest(again) == digest(state)
    assert int(state.federated.server.noise.count) == 4
    assert float(state.federated.server.relative_clip_norm) != 1.0
    with Ledger.open(broken.ledger_path) as ledger:
        assert sum(r["kind"] == "release" for r in ledger.records) == 4


def test_the_card_is_for_clients(finished):
    run, _, done = finished
    card = read_card(run.folder / "card.json")
    assert card["claim"]["unit"].startswith("one person with at most 3 rows")
    assert card["accounting"]["dataset_size"] == len(run.federation.clients) == len(run.training)
    assert card["accounting"]["steps_executed"] == 4
    assert "scaffold" in json.dumps(card["training"]) and "simulation" in json.dumps(card)
    losses = json.loads((run.folder / "clients.json").read_text(encoding="utf-8"))
    assert len(losses["before"]) == len(losses["after"]) == len(run.federation.clients)
    assert (run.folder / "clients.svg").exists()
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "own losses" in page
    with Ledger.open(run.ledger_path) as ledger:
        refresh(run, ledger, public=True)
    public = (run.folder / "report-public.html").read_text(encoding="utf-8")
    assert "own losses" not in public


def test_a_run_on_other_settings_is_not_resumed(finished, tmp_path):
    run, _, _ = finished
    saved = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    saved["federate"]["local_epochs"] = 2
    (tmp_path / "run.json").write_text(json.dumps(saved), encoding="utf-8")
    other = reopen(tmp_path)
    assert other.config_sha256 != run.config_sha256
    assert other.federation.local.epochs == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"user_field": None}, "user_field"),
        ({"partition": "iid"}, "num_clients"),
        ({"partition": "dirichlet", "num_clients": 4}, "label_field"),
        ({"devices": 512}, "512"),
        ({"exact_lora": True}, "exact_lora"),
        ({"local_batch_size": 0}, "local_batch_size is 0"),
        ({"imagined_cohort": 2}, "imagined_cohort is 2"),
    ],
)
def test_bad_settings_get_one_line(config, changes, words):
    with pytest.raises(DpjaxError, match=words) as caught:
        opened(dataclasses.replace(config, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_partitions_deal_every_record_once(config, partition):
    run = opened(
        dataclasses.replace(
            config, partition=partition, num_clients=6, label_field="ward",
            max_examples_per_client=90, user_field=None,
        )
    )  # fmt: skip
    assert len(run.federation.clients) == 6
    assert int(run.federation.clients.sizes.sum()) + len(run.held_out) == len(RECORDS)


def test_a_simulated_cohort_is_never_alone(config):
    run = opened(dataclasses.replace(config, imagined_cohort=800, adaptive_quantile=None))
    text = describe(run)
    simulated = next(line for line in text.splitlines() if "SIMULATED" in line)
    assert "SIMULATED epsilon 8" in simulated and "actual epsilon" in simulated
    # What the run claims is the actual one.
    assert run.mechanism.epsilon(run.delta) > 100
    assert f"epsilon {run.mechanism.epsilon(run.delta):.3f} (RDP)" in text


def test_fixed_point_sums_train_like_floats(config, tmp_path):
    changes = {"adaptive_quantile": None, "algorithm": "fed_avg", "noise_multiplier": 1e-3}
    ends = []
    for name in ("plain", "fixed_point"):
        run = opened(
            dataclasses.replace(
                config, output=str(tmp_path / name), aggregation=name, target_epsilon=None,
                iterations=1, **changes,
            )
        )  # fmt: skip
        create(run)
        ends.append(whole_state(run).params)
    differences = jax.tree.map(lambda a, b: float(abs(a - b).max()), *ends)
    largest = max(jax.tree.leaves(differences))
    assert 0 < largest < 1e-6


def test_federated_lora_releases_a_whole_model(config, tmp_path):
    """Exact adapters: the adapted matrices move on the server, and the rest stays."""
    run = opened(
        dataclasses.replace(
            config, output=str(tmp_path / "lora"), tuning="lora", lora=LoRA(2), exact_lora=True,
            algorithm="fed_avg", iterations=2, adaptive_quantile=None,
        )
    )  # fmt: skip
    create(run)
    state = whole_state(run)
    before = combine(run.point.trainable, run.point.frozen)
    after = combine(state.params, run.point.frozen)
    attention = "blocks", 0, "attention", "query"
    for name in attention:
        before, after = before[name], after[name]
    assert all(bool((before[n] != after[n]).any()) for n in ("kernel", "lora_a", "lora_b"))
