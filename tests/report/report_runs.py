"""Small runs whose ledgers are written for real, once for all tests."""

import datetime
import json

from dpjax.ledger import GENESIS, Ledger, _canonical, _digest
from dpjax.mechanism import DPSGD
from dpjax.report import CardInputs, build_card

POPULATION = 500
DELTA = 1e-4
WHEN = datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)


def mechanism(iterations=20, noise_multiplier=2.0, **changes):
    settings = {"population": POPULATION, "normalize_by": 25.0, **changes}
    return DPSGD(1.0, 0.05, iterations, noise_multiplier=noise_multiplier, **settings)


def trained(path, planned, executed=None, trials=0):
    """A ledger with ``trials`` complete runs and one of ``executed`` iterations."""
    with Ledger.open(path) as ledger:
        for number in range(trials + 1):
            run = ledger.start_run(planned, POPULATION, {})
            sampler = planned.planned_sampler(POPULATION)
            last = planned.iterations if executed is None else executed
            for i in range(last if number == trials else planned.iterations):
                ledger.record_release(run, i, sampler, planned.noise_multiplier)
    return path


def forge(path, change):
    """Rewrites every record through ``change`` with a chain that is intact again."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    previous, lines = GENESIS, []
    for index, record in enumerate(record for r in records for record in change(r)):
        record = {**record, "index": index, "previous": previous}
        record.pop("hash", None)
        record["hash"] = previous = _digest(record)
        lines.append(_canonical(record) + "\n")
    path.write_text("".join(lines))


def card_of(path, planned, run=0, **changes):
    given = {
        "delta": DELTA,
        "unit": "one message",
        "dataset_name": "letters",
        "dataset_size": POPULATION,
        "artifact_sha256": "ab" * 32,
        "model_name": "nano",
        "max_units_per_person": 1,
        "dataset_size_is_public": True,
        "trials_outside_ledger": 0,
        **changes,
    }
    with Ledger.open(path) as ledger:
        return build_card(CardInputs(planned, ledger, run, **given), WHEN)


def hazards(card):
    return {hazard["code"] for hazard in card["hazards"]}
