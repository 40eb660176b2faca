"""The ledger: every edit is found, nothing is lost, the budget is never passed."""

import json
import os

import dp_accounting
import jax
import pytest

from dpjax import accounting
from dpjax import ledger as ledgers
from dpjax.correlated_noise import CorrelatedNoise
from dpjax.errors import DpjaxError
from dpjax.ledger import Ledger, affordable_iterations
from dpjax.mechanism import DPSGD
from dpjax.strategies import Tree

MECHANISM = DPSGD(1.0, 0.1, 20, noise_multiplier=1.5)
SAMPLER = MECHANISM.sampler(1000, jax.random.key(0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def written(path, releases=5):
    with Ledger.open(path) as ledger:
        run = ledger.start_run(MECHANISM, 1000, {"name": "一"})
        for i in range(releases):
            ledger.record_release(run, i, SAMPLER, 1.5)
    return path.read_bytes()


def test_epsilon_is_that_of_the_releases_made(path):
    written(path, 7)
    with Ledger.open(path) as ledger:
        assert ledger.epsilon(1e-5) == pytest.approx(MECHANISM.epsilon(1e-5, iterations=7))
        assert ledger.dp_event() == MECHANISM.dp_event_after(7)
        assert path.stat().st_mode & 0o777 == 0o600


def test_every_altered_byte_is_found(path):
    content = written(path, 3)
    for position in range(0, len(content) - 1, 7):
        altered = bytearray(content)
        altered[position] ^= 0x01
        path.write_bytes(bytes(altered))
        with pytest.raises(DpjaxError, match=r"corrupt at line \d"):
            Ledger.open(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [*lines[:1], *lines[2:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:2], b"\n", *lines[2:]],
    ],
    ids=["deleted", "beheaded", "reordered", "repeated", "blank line"],
)
def test_edited_lines_are_found(path, edit):
    lines = written(path).splitlines(keepends=True)
    path.write_bytes(b"".join(edit(lines)))
    with pytest.raises(DpjaxError, match="corrupt at line"):
        Ledger.open(path)


def test_a_recomputed_hash_still_breaks_the_chain(path):
    lines = written(path).splitlines()
    record = json.loads(lines[2])
    del record["hash"]
    record["release"]["noise_multiplier"] = 9.0
    record["hash"] = ledgers._digest(record)
    lines[2] = ledgers._canonical(record).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DpjaxError, match="corrupt at line 4"):
        Ledger.open(path)


def test_a_torn_last_line_is_dropped_and_writing_goes_on(path):
    content = written(path, 4)
    last = content.splitlines(keepends=True)[-1]
    for length in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(content[: len(content) - len(last)] + last[:length])
        with Ledger.open(path) as ledger:
            ledger.record_release(0, 3, SAMPLER, 1.5)
        assert path.read_bytes() == content


def test_one_writer_at_a_time(path):
    with Ledger.open(path), pytest.raises(DpjaxError, match="in use by another process"):
        Ledger.open(path)
    Ledger.open(path).close()


def test_replay_is_accepted_only_if_identical(path):
    before = written(path, 4)
    with Ledger.open(path) as ledger:
        ledger.record_release(0, 2, SAMPLER, 1.5)
        with pytest.raises(DpjaxError, match="cannot be replaced"):
            ledger.record_release(0, 2, SAMPLER, 1.4)
        with pytest.raises(DpjaxError, match="does not follow"):
            ledger.record_release(0, 9, SAMPLER, 1.5)
    assert path.read_bytes() == before


def test_a_full_disk_loses_nothing_and_is_said_in_one_line(path, monkeypatch):
    content = written(path, 2)
    write = os.write

    with Ledger.open(path) as ledger:
        calls = iter([10])

        def once_then_full(descriptor, data):
            if next(calls, None):
                return write(descriptor, data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", once_then_full)
        with pytest.raises(DpjaxError, match="the disk is full") as caught:
            ledger.record_release(0, 2, SAMPLER, 1.5)
        assert "\n" not in str(caught.value)
        monkeypatch.setattr(os, "write", write)
        assert path.read_bytes() == content
        ledger.record_release(0, 2, SAMPLER, 1.5)
    with Ledger.open(path) as ledger:
        assert len(ledger.records) == 4


@pytest.mark.parametrize("earlier", [0, 6])
def test_the_budget_is_never_passed_and_always_used(path, earlier):
    target = 1.05 * MECHANISM.epsilon(1e-5, iterations=12)
    with Ledger.open(path) as ledger:
        trial = ledger.start_run(MECHANISM, 1000, {})
        for i in range(earlier):
            ledger.record_release(trial, i, SAMPLER, 1.5)
        run = ledger.start_run(MECHANISM, 1000, {})
        allowed = affordable_iterations(ledger, run, MECHANISM, 1000, target, 1e-5)
        total = MECHANISM.epsilon(1e-5, iterations=allowed + earlier)
        assert total <= target < MECHANISM.epsilon(1e-5, iterations=allowed + earlier + 1)
        for i in range(allowed):
            ledger.record_release(run, i, SAMPLER, 1.5)
        assert ledger.epsilon(1e-5) == pytest.approx(total)


def test_runs_under_different_relations_do_not_add_up(path):
    other = DPSGD(1.0, 0.1, 5, noise_multiplier=1.0, sampling="shuffled", population=1000)
    with Ledger.open(path) as ledger:
        ledger.start_run(MECHANISM, 1000, {})
        ledger.start_run(other, 1000, {})
        with pytest.raises(DpjaxError, match="do not add up"):
            ledger.epsilon(1e-5)


def test_a_run_ends_once(path):
    with Ledger.open(path) as ledger:
        run = ledger.start_run(MECHANISM, 1000, {})
        ledger.end_run(run, "completed")
        ledger.end_run(run, "completed")
        assert [r["kind"] for r in ledger.records] == ["run", "end"]


CORRELATED = DPSGD(
    1.0, 0.1, 20, noise_multiplier=1.5, sampling="cyclic", population=1000,
    correlated_noise=CorrelatedNoise("banded", num_bands=3),
)  # fmt: skip


def correlated(ledger, run, iterations, mechanism=CORRELATED):
    sampler = mechanism.sampler(1000, jax.random.key(0))
    for i in range(iterations):
        ledger.record_release(run, i, sampler, 1.5, mechanism.strategy)


def test_a_run_with_correlated_noise_is_one_event(path):
    with Ledger.open(path) as ledger:
        run = ledger.start_run(CORRELATED, 1000, {})
        correlated(ledger, run, 7)
    with Ledger.open(path) as ledger:  # read back from the file alone
        assert ledger.dp_event() == dp_accounting.GaussianDpEvent(1.5) == CORRELATED.dp_event
        correlated(ledger, 0, 20)
        assert ledger.dp_event() == dp_accounting.GaussianDpEvent(1.5)
        second = ledger.start_run(CORRELATED, 1000, {})
        correlated(ledger, second, 1)
        two = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.5), 2)
        expected = accounting.epsilon(two, 1e-5)
        assert ledger.epsilon(1e-5) == pytest.approx(expected)


def test_correlated_noise_is_as_planned_or_not_recorded(path):
    with Ledger.open(path) as ledger:
        run = ledger.start_run(CORRELATED, 1000, {})
        correlated(ledger, run, 2)
        sampler = CORRELATED.sampler(1000, jax.random.key(0))
        for noise_multiplier, strategy in (
            (1.5, Tree(20)),
            (1.5, None),
            (1.4, CORRELATED.strategy),
        ):
            with pytest.raises(DpjaxError, match="its plan is"):
                ledger.record_release(run, 2, sampler, noise_multiplier, strategy)
        independent = ledger.start_run(MECHANISM, 1000, {})
        with pytest.raises(DpjaxError, match="its plan is"):
            ledger.record_release(independent, 0, SAMPLER, 1.5, CORRELATED.strategy)
        correlated(ledger, run, 20)
        with pytest.raises(DpjaxError, match="beyond the 20"):
            ledger.record_release(run, 20, sampler, 1.5, CORRELATED.strategy)


def test_a_budget_affords_all_of_a_correlated_run_or_nothing(path):
    epsilon = CORRELATED.epsilon(1e-5)
    with Ledger.open(path) as ledger:
        first = ledger.start_run(CORRELATED, 1000, {})
        given = (ledger, first, CORRELATED, 1000)
        assert affordable_iterations(*given, 1.001 * epsilon, 1e-5) == 20
        assert affordable_iterations(*given, 0.999 * epsilon, 1e-5) == 0
        correlated(ledger, first, 1)
        assert affordable_iterations(*given, 1.001 * epsilon, 1e-5) == 20  # its own are paid
        second = ledger.start_run(CORRELATED, 1000, {})
        assert affordable_iterations(ledger, second, *given[2:], 1.001 * epsilon, 1e-5) == 0
