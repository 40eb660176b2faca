"""Cards that many tests read, built once."""

import pytest
from report_runs import card_of, mechanism, trained

from dpjax import accounting
from dpjax.report import evidence


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="session")
def private_card(folder):
    planned = mechanism()
    return card_of(trained(folder / "private.jsonl", planned), planned)


@pytest.fixture(scope="session")
def void_card(folder):
    planned = mechanism(noise_multiplier=0.0)
    return card_of(trained(folder / "void.jsonl", planned), planned)


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the slow extras of a card: groups, mu and most of the profile."""
    monkeypatch.setattr(evidence, "_GROUPS", ())
    monkeypatch.setattr(evidence, "_PROFILE", ())
    monkeypatch.setattr(accounting, "gaussian_dp_mu", lambda event, population: None)
