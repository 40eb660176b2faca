"""The card says what the ledger bears out, and nothing when it bears out nothing."""

import json
import math

import dp_accounting
import numpy as np
import pytest
from report_runs import DELTA, POPULATION, card_of, forge, hazards, mechanism, trained

from dpjax import accounting
from dpjax.correlated_noise import CorrelatedNoise
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger
from dpjax.report import validate_card
from dpjax.report.card import round_up


def carries_no_epsilon(card):
    claim = card["claim"]
    assert [claim[name] for name in ("epsilon", "epsilon_rdp", "epsilon_pld")] == [None] * 3
    assert claim["bound_type"] == "none"
    assert claim["groups"] == claim["privacy_profile"] == []
    assert claim["gaussian_dp"] is None and claim["membership_test"] is None
    assert claim["epsilon_in_words"].startswith("no formal guarantee")
    assert "no formal guarantee" in claim["statement"]
    assert card["coverage"]["data_accesses_covered"] == []
    return True


def test_private_card_states_the_ledgers_epsilon(private_card, folder):
    validate_card(private_card)
    claim = private_card["claim"]
    with Ledger.open(folder / "private.jsonl") as ledger:
        assert claim["epsilon_rdp"] == pytest.approx(ledger.epsilon(DELTA), rel=1e-9)
        assert claim["epsilon_pld"] == pytest.approx(ledger.epsilon(DELTA, "pld"), rel=1e-9)
        assert private_card["software"]["ledger_head"] == ledger.head
    assert claim["epsilon"] == claim["epsilon_rdp"] > claim["epsilon_pld"]
    assert claim["total"]["epsilon"] == claim["epsilon"]
    assert claim["bound_type"] == "upper"
    assert private_card["accounting"]["match"]
    assert private_card["accounting"]["steps_executed"] == 20
    assert private_card["identity"]["created"] == "2026-03-04T05:06:07+00:00"
    assert hazards(private_card) == set()
    assert private_card["audit"] == {
        "performed": False,
        "epsilon_lower": None,
        "verdict": "not audited",
    }
    json.dumps(private_card, allow_nan=False)


def test_published_accountant_value(quick, folder):
    """sigma 1.5, q 0.04, 2,250 steps, delta 1e-5: 7.329 by RDP in the literature."""
    from dpjax.mechanism import DPSGD

    planned = DPSGD(1.0, 0.04, 2250, noise_multiplier=1.5, population=POPULATION)
    path = trained(folder / "literature.jsonl", planned, executed=0)

    def fill(record):
        yield record
        release = record["plan"]["release"]
        for i in range(2250):
            yield {"kind": "release", "run": 0, "iteration": i, "release": release}

    forge(path, fill)
    claim = card_of(path, planned, delta=1e-5)["claim"]
    assert claim["epsilon_rdp"] == pytest.approx(7.329, abs=1e-3)
    assert claim["epsilon_pld"] == pytest.approx(6.769, abs=1e-3)
    assert round_up(claim["epsilon"]) in claim["statement"]
    assert claim["epsilon_by_iteration"]["iterations"][-1] == 2250


def test_epsilon_is_of_what_ran(quick, folder, private_card):
    planned = mechanism()
    card = card_of(trained(folder / "short.jsonl", planned, executed=5), planned)
    assert card["accounting"]["match"] and card["accounting"]["steps_executed"] == 5
    assert card["claim"]["epsilon_rdp"] == pytest.approx(planned.epsilon(DELTA, iterations=5))
    assert card["claim"]["epsilon"] < private_card["claim"]["epsilon"]
    assert "stopped_early" in hazards(card)
    validate_card(card)


def test_groups_and_mu(private_card):
    claim = private_card["claim"]
    assert [group["size"] for group in claim["groups"]] == [2, 4, 8]
    epsilons = [claim["epsilon_pld"], *(group["epsilon"] for group in claim["groups"])]
    assert epsilons == sorted(epsilons)
    assert claim["gaussian_dp"]["mu"] > 0 and claim["gaussian_dp"]["regret"] >= 0
    assert 0.01 < claim["membership_test"]["true_positive_rate_bound"] < 0.1


def test_nothing_ran(folder):
    planned = mechanism()
    card = card_of(trained(folder / "nothing.jsonl", planned, executed=0), planned)
    assert card["claim"]["epsilon"] == 0.0
    assert card["claim"]["statement"].startswith("No iteration ran")
    validate_card(card)


def test_without_noise_there_is_no_epsilon(void_card):
    assert carries_no_epsilon(void_card)
    assert void_card["claim"]["total"]["epsilon"] is None
    assert void_card["accounting"]["match"]
    assert "no_formal_guarantee" in hazards(void_card)
    validate_card(void_card)


def test_unbounded_clipping_is_a_word(folder):
    from dpjax.mechanism import DPSGD

    planned = DPSGD(math.inf, 0.05, 3, noise_multiplier=0.0, population=POPULATION)
    card = card_of(trained(folder / "unbounded.jsonl", planned), planned)
    assert card["training"]["clipping"]["l2_clip_norm"] == "unbounded"
    validate_card(card)
    json.dumps(card, allow_nan=False)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 1.9},
        {"sampling_probability": 0.06},
        {"population": 501},
    ],
)
def test_another_release_than_planned_voids_the_card(folder, change):
    planned = mechanism()
    path = trained(folder / f"forged {change}.jsonl", planned)

    def weaken(record):
        if record["kind"] == "release" and record["iteration"] == 7:
            record = {**record, "release": {**record["release"], **change}}
        yield record

    forge(path, weaken)
    card = card_of(path, planned)
    assert carries_no_epsilon(card)
    assert not card["accounting"]["match"]
    assert card["claim"]["total"]["epsilon"] is None
    assert next(iter(change)) in card["accounting"]["mismatches"][0]
    assert "sampling_mismatch" in hazards(card)
    assert sum(entry["count"] for entry in card["accounting"]["sampling_actual"]) == 20
    validate_card(card)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "shuffled"},
        {"noise_multiplier": 3.0},
        {"iterations": 30},
        {"normalize_by": 1.0},
        {"sampling": "truncated_poisson", "truncated_batch_size": 100},
    ],
)
def test_another_mechanism_than_the_ledgers_voids_the_card(folder, private_card, changes):
    card = card_of(folder / "private.jsonl", mechanism(**changes))
    assert carries_no_epsilon(card) and not card["accounting"]["match"]
    validate_card(card)


def test_more_steps_than_planned_void_the_card(folder):
    planned = mechanism()
    path = trained(folder / "long.jsonl", planned)

    def repeat(record):
        yield record
        if record["kind"] == "release" and record["iteration"] == 19:
            yield {**record, "iteration": 20}

    forge(path, repeat)
    card = card_of(path, planned)
    assert carries_no_epsilon(card)
    assert card["accounting"]["match"] and not card["accounting"]["steps_within_plan"]
    assert card["accounting"]["steps_executed"] == 21
    assert "more_steps_than_planned" in hazards(card)
    validate_card(card)


def test_trials_add_up(quick, folder, private_card):
    planned = mechanism()
    card = card_of(trained(folder / "trials.jsonl", planned, trials=2), planned, run=2)
    claim = card["claim"]
    assert claim["epsilon"] == pytest.approx(private_card["claim"]["epsilon"])
    # Three equal runs of 20 iterations are one run of 60.
    together = planned.dp_event_after(60)
    assert claim["total"]["runs"] == 3
    assert claim["total"]["epsilon_rdp"] == pytest.approx(accounting.epsilon(together, DELTA))
    expected = accounting.epsilon(together, DELTA, "pld")
    assert claim["total"]["epsilon_pld"] == pytest.approx(expected, rel=1e-3)
    assert round_up(claim["total"]["epsilon"]) in claim["statement"]
    assert card["coverage"]["tuning"]["trials_in_ledger"] == 3
    assert "several_runs" in hazards(card)
    validate_card(card)


def test_a_trial_without_noise_leaves_no_total(quick, folder):
    path = trained(folder / "mixed.jsonl", mechanism(noise_multiplier=0.0))
    planned = mechanism()
    trained(path, planned)
    card = card_of(path, planned, run=1)
    assert card["claim"]["epsilon"] is not None
    assert card["claim"]["total"]["epsilon"] is None
    assert card["claim"]["total"]["words"].startswith("no formal guarantee")
    validate_card(card)


def test_a_trial_that_left_its_plan_leaves_no_total(quick, folder):
    planned = mechanism()
    path = trained(folder / "bad trial.jsonl", planned, trials=1)

    def weaken(record):
        if record["kind"] == "release" and record["run"] == 0:
            record = {**record, "release": {**record["release"], "noise_multiplier": 0.1}}
        yield record

    forge(path, weaken)
    card = card_of(path, planned, run=1)
    assert card["claim"]["epsilon"] is not None and card["claim"]["total"]["epsilon"] is None
    assert "ledger_total_unknown" in hazards(card)
    validate_card(card)


def test_truncated_poisson_pays_for_truncation(quick, folder):
    planned = mechanism(sampling="truncated_poisson", truncated_batch_size=60)
    card = card_of(trained(folder / "truncated.jsonl", planned), planned)
    claim, truncation = card["claim"], card["accounting"]["truncation"]
    assert claim["epsilon_rdp"] == pytest.approx(planned.epsilon(DELTA))
    assert claim["epsilon_pld"] == pytest.approx(planned.epsilon(DELTA, "pld"), rel=1e-6)
    assert 0 < truncation["probability"] < truncation["delta_paid"] < DELTA
    validate_card(card)


@pytest.mark.parametrize("sampling", ["fixed_size", "shuffled", "cyclic"])
def test_other_samplers(quick, folder, sampling):
    planned = mechanism(sampling=sampling)
    card = card_of(trained(folder / f"{sampling}.jsonl", planned), planned)
    assert card["claim"]["epsilon_rdp"] == pytest.approx(planned.epsilon(DELTA))
    assert card["claim"]["epsilon_by_iteration"]["epsilon_rdp"][-1] == pytest.approx(
        planned.epsilon(DELTA)
    )
    if sampling == "fixed_size":
        assert card["claim"]["epsilon_pld"] is None
        assert "no bound known by PLD" in card["claim"]["epsilon_in_words"]
    validate_card(card)


@pytest.mark.parametrize(
    ("sampling", "noise"),
    [("cyclic", CorrelatedNoise("tree")), ("cyclic_poisson", CorrelatedNoise(num_bands=4))],
)
def test_correlated_noise(quick, folder, sampling, noise):
    planned = mechanism(iterations=30, sampling=sampling, correlated_noise=noise)
    path = folder / f"{sampling} correlated.jsonl"
    with Ledger.open(path) as ledger:
        run = ledger.start_run(planned, POPULATION, {})
        sampler = planned.planned_sampler(POPULATION)
        for i in range(30):
            ledger.record_release(run, i, sampler, 2.0, planned.strategy)
    card = card_of(path, planned)
    assert card["accounting"]["match"] and card["accounting"]["dp_event"] == repr(planned.dp_event)
    claim = card["claim"]
    assert claim["epsilon_rdp"] == pytest.approx(planned.epsilon(DELTA))
    spent = claim["epsilon_by_iteration"]["epsilon_rdp"]
    assert spent[-1] == pytest.approx(planned.epsilon(DELTA))
    if sampling == "cyclic":
        assert spent[1] == spent[-1]  # the first iteration costs as much as all
    assert "correlated Gaussian noise" in claim["mechanism"]
    assert card["training"]["strategy_matrix"].startswith(planned.strategy.kind)
    validate_card(card)
    # The same iterations as if their noise were independent are another mechanism.
    assert not card_of(path, mechanism(iterations=30))["accounting"]["match"]


def test_profile_is_consistent(private_card):
    profile = private_card["claim"]["privacy_profile"]
    deltas = [point["delta"] for point in profile]
    assert DELTA in deltas and deltas == sorted(deltas, reverse=True)
    for name in ("epsilon_rdp", "epsilon_pld"):
        values = [point[name] for point in profile]
        assert values == sorted(values)
    assert all(point["epsilon_pld"] < point["epsilon_rdp"] for point in profile)
    spent = private_card["claim"]["epsilon_by_iteration"]
    assert spent["iterations"][0] == 0 and spent["iterations"][-1] == 20
    assert np.all(np.diff(spent["epsilon_rdp"]) > 0)
    assert spent["epsilon_rdp"][-1] == pytest.approx(private_card["claim"]["epsilon_rdp"])


def test_hazards_are_raised_by_code(quick, folder, private_card):
    card = card_of(
        folder / "private.jsonl",
        mechanism(),
        delta=1 / POPULATION,
        max_units_per_person=None,
        examples_per_record=2,
        dataset_size_is_public=False,
        published_key=True,
        trials_outside_ledger=3,
        preprocessing=(
            {"step": "deduplication", "data_dependent": True, "private": False},
            {"step": "lower case", "data_dependent": False, "private": False},
        ),
        pretraining=({"name": "diary", "public": False, "overlap": "possible"},),
        utility=(
            {
                "metric": "loss",
                "split": "held out",
                "value": 3.0,
                "low": 2.9,
                "high": 3.1,
                "n": 50,
                "covered": False,
            },
        ),
    )
    assert hazards(card) == {
        "delta_not_below_1_over_n",
        "unit_smaller_than_person",
        "unit_smaller_than_record",
        "dataset_size_not_public",
        "published_key",
        "tuning_uncovered",
        "preprocessing_uncovered",
        "pretraining_not_public",
        "pretraining_overlap",
        "utility_uncovered",
    }
    text = next(h["text"] for h in card["hazards"] if h["code"] == "preprocessing_uncovered")
    assert "deduplication" in text and "lower case" not in text
    assert [group["size"] for group in card["claim"]["groups"]] == [2]  # one whole record
    order = [hazard["severity"] for hazard in card["hazards"]]
    assert order == sorted(order, key=("void", "warning", "note").index)
    assert card["claim"]["max_units_per_person_in_words"] == "unknown"
    validate_card(card)


def test_noise_for_an_imagined_cohort(quick, folder):
    """The noise that 50 times as many clients would have needed."""
    planned = mechanism()
    path = trained(folder / "imagined.jsonl", planned)

    def weaken(record):
        if record["kind"] == "release":
            release = {**record["release"], "noise_multiplier": 2.0 / 50}
            record = {**record, "release": release}
        yield record

    forge(path, weaken)
    card = card_of(path, planned)
    assert carries_no_epsilon(card) and "noise_rescaled" in hazards(card)
    words = next(h for h in card["hazards"] if h["code"] == "noise_rescaled")["text"]
    assert "0.04 times" in words and "2 was accounted" in words
    # More noise than planned voids the card too, but nobody imagined a cohort.
    other = card_of(folder / "imagined.jsonl", mechanism(noise_multiplier=0.01))
    assert carries_no_epsilon(other) and "noise_rescaled" not in hazards(other)
    # Planned for more units than there were.
    real = trained(folder / "real.jsonl", mechanism())
    card = card_of(real, mechanism(population=50 * POPULATION))
    assert "imagined_cohort" in hazards(card)
    assert "imagined_cohort" not in hazards(card_of(real, mechanism()))


def test_single_updates_that_a_server_sees(quick, folder, private_card):
    assert "intermediate_releases_uncovered" not in hazards(private_card)
    path, planned = folder / "private.jsonl", mechanism()

    def seen(**changes):
        card = card_of(path, planned, views=("S", "W"), **changes)
        validate_card(card)
        view = card["setting"]["threat_views"][0]
        assert view["view"] == "S" and view["opened"] and card["setting"]["model"]
        return view, "intermediate_releases_uncovered" in hazards(card)

    view, raised = seen()
    assert raised and not view["covered"]
    assert view["words"].startswith("no formal guarantee")
    view, raised = seen(model="distributed", cryptography="pairwise masks")
    assert raised and not view["covered"] and "secure aggregation" in view["words"]
    view, raised = seen(model="local")
    assert not raised and view["covered"]


def test_a_diverged_loss_is_null(quick, folder, private_card):
    number = {"metric": "loss", "split": "held out", "n": None, "covered": False}
    number |= {"value": math.nan, "low": -math.inf, "high": None}
    card = card_of(folder / "private.jsonl", mechanism(), utility=(number,))
    assert [card["utility"][0][key] for key in ("value", "low", "high")] == [None] * 3
    validate_card(card)


def test_large_epsilon_is_a_hazard(quick, folder, monkeypatch):
    from dpjax.report import hazards as raised

    assert raised.LARGE_EPSILON == 10.0
    planned = mechanism(2)
    path = trained(folder / "weak.jsonl", planned)
    epsilon = planned.epsilon(DELTA)
    for limit, expected in ((epsilon * 1.01, False), (epsilon * 0.99, True)):
        monkeypatch.setattr(raised, "LARGE_EPSILON", limit)
        assert ("epsilon_above_10" in hazards(card_of(path, planned))) == expected


def test_created_is_now_in_utc_by_default(folder, void_card):
    import datetime

    from dpjax.report import CardInputs, build_card

    with Ledger.open(folder / "void.jsonl") as ledger:
        given = (ledger, 0, DELTA, "one message", "letters", POPULATION, "ab" * 32, "nano")
        card = build_card(CardInputs(mechanism(noise_multiplier=0.0), *given))
    made = datetime.datetime.fromisoformat(card["identity"]["created"])
    age = datetime.datetime.now(datetime.UTC) - made
    assert datetime.timedelta(seconds=-1) <= age < datetime.timedelta(minutes=5)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"delta": 1.5}, "delta is 1.5"),
        ({"unit": " "}, "unit is empty"),
        ({"dataset_size": 0}, "dataset_size is 0"),
        ({"max_units_per_person": 0}, "max_units_per_person is 0"),
        ({"artifact_sha256": "abc"}, "artifact_sha256 is 'abc'"),
        ({"config_sha256": "XY" * 32}, "config_sha256 is"),
        ({"views": ("Q",)}, "views holds 'Q'"),
        ({"model": "federated"}, "model is 'federated'"),
        ({"run": 5}, "run 5 is not in ledger"),
        ({"pretraining": ({"name": "x"},)}, "an entry of pretraining"),
        (
            {"pretraining": ({"name": "x", "public": True, "overlap": "some"},)},
            "overlap of pretraining data 'x' is 'some'",
        ),
        ({"utility": ({"metric": "loss"},)}, "an entry of utility"),
    ],
)
def test_bad_inputs_get_one_line(folder, private_card, changes, fragment):
    with pytest.raises(DpjaxError) as caught:
        card_of(folder / "private.jsonl", mechanism(), **changes)
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_merging_keeps_the_composition():
    from dpjax.report.guarantees import merged

    first = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(3.0), 4)
    second = dp_accounting.GaussianDpEvent(2.0)
    event = dp_accounting.ComposedDpEvent([first, second, first, second])
    assert accounting.epsilon(merged(event), 1e-5) == pytest.approx(accounting.epsilon(event, 1e-5))
    assert len(merged(event).events) == 2
