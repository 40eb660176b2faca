"""Quality measures against closed forms, slow loops and constructed cases."""

import itertools

import numpy as np
import pytest

from dpjax.data import domain_records
from dpjax.errors import DpjaxError
from dpjax.quality import (
    _frontier,
    compare_statistics,
    count_copies,
    count_secrets,
    divergence,
    downstream_accuracy,
    text_statistics,
    words,
)


@pytest.mark.parametrize("locale", ["en_US", "zh_CN"])
def test_a_classifier_learns_from_good_records_and_not_from_shuffled_labels(locale):
    records = domain_records("support", 400, seed=0, locale=locale)
    texts, labels = [r.text for r in records], [r.label for r in records]
    good = downstream_accuracy(texts[:300], labels[:300], texts[300:], labels[300:])
    assert good.accuracy > 0.7
    assert good.low < good.accuracy < good.high and good.high - good.low < 0.25
    shuffled = np.random.default_rng(0).permutation(labels[:300]).tolist()
    assert downstream_accuracy(texts[:300], shuffled, texts[300:], labels[300:]).accuracy < 0.45


def test_accuracy_where_labels_are_missing():
    only = downstream_accuracy(["a", "b"], ["x", "x"], ["a", "b", "c", "d"], ["x", "y", "x", "z"])
    assert only.accuracy == 0.5 and only.per_label == {"x": 1.0, "y": 0.0, "z": 0.0}
    # Wilson's interval at 2 of 4, from its formula.
    z, n, p = 1.959964, 4, 0.5
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (only.low, only.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    with pytest.raises(DpjaxError, match="1 texts and 2 labels"):
        downstream_accuracy(["a"], ["x", "y"], ["a"], ["x"])


def slow_area(p, q):
    """The area under the divergence frontier by a fine loop over mixtures."""
    points = [(1.0, 0.0)]
    for weight in np.linspace(1e-6, 1 - 1e-6, 4001):
        r = [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]
        to = [sum(a * np.log(a / m) for a, m in zip(x, r, strict=True) if a > 0) for x in (q, p)]
        points.append((np.exp(-5 * to[0]), np.exp(-5 * to[1])))
    points.append((0.0, 1.0))
    pairs = itertools.pairwise(points)
    return sum((x0 - x1) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_encloses_the_area_of_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    x, y = _frontier(p, q).T
    assert abs(np.trapezoid(y, x)) == pytest.approx(slow_area(p, q), abs=2e-3)


def test_equal_distributions_score_one_and_disjoint_ones_nearly_nothing():
    assert abs(np.trapezoid(*_frontier(np.full(5, 0.2), np.full(5, 0.2)).T)) == pytest.approx(1.0)
    # Disjoint: x = (1 - w)^5, y = w^5, whose area is 5 B(5, 6) = 1/252.
    far = _frontier(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert abs(np.trapezoid(*far.T)) == pytest.approx(1 / 252, rel=0.02)


def test_divergence_falls_with_the_share_of_foreign_vectors():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(600, 6)) + 2
    scores = []
    for share in (0.0, 0.2, 0.5, 1.0):
        foreign = rng.random(600) < share
        other = np.where(
            foreign[:, None], rng.normal(size=(600, 6)) - 2, rng.normal(size=(600, 6)) + 2
        )
        found = divergence(real, other, 12)
        scores.append(found.mauve)
        swapped = divergence(other, 3 * real, 12)  # neither order nor length of vectors matters
        assert swapped.mauve == pytest.approx(found.mauve, abs=0.08)
    assert scores[0] > 0.95 and scores[-1] < 0.05
    assert scores[0] > scores[1] + 0.02 > scores[2] + 0.15
    with pytest.raises(DpjaxError, match="NaN"):
        divergence(np.full((4, 2), np.nan), real[:4, :2])
    with pytest.raises(DpjaxError, match="shapes"):
        divergence(real, real[:, :3])


def test_statistics_of_known_texts():
    found = text_statistics(["one two", "one two", "", "三个 words"])
    assert found.num_texts == 4 and found.words_mean == 7 / 4
    assert (found.duplicate_share, found.empty_share) == (0.25, 0.25)
    assert found.distinct[:2] == (5 / 7, 4 / 4 - 1 / 4)
    same = compare_statistics(["a b c", "d e f"], ["d e f", "a b c"])
    assert tuple(same) == (0.0, 0.0, 0.0, 0.0)
    other = compare_statistics(["a b c"], ["x y z w"])
    assert tuple(other) == (1.0, 1.0, 1.0, 1.0)
    # By hand: unigrams (1/2, 1/2, 0) against (1/2, 0, 1/2).
    half = compare_statistics(["a b"], ["a c"])
    assert half.unigram_divergence == pytest.approx(0.5)


def slow_longest_run(a, b):
    """The longest common run of words, by comparing every start with every other."""
    best = 0
    for i, j in itertools.product(range(len(a)), range(len(b))):
        shared = 0
        while i + shared < len(a) and j + shared < len(b) and a[i + shared] == b[j + shared]:
            shared += 1
        best = max(best, shared)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_those_of_a_slow_comparison(seed):
    rng = np.random.default_rng(seed)
    training = [" ".join(rng.choice([*"abcd"], 30)) for _ in range(8)]
    texts = [" ".join(rng.choice([*"abcd"], 30)) for _ in range(8)]
    texts[3] = training[5][10:40].upper()
    texts[4] = f" {training[0]}  "
    runs = [max(slow_longest_run(words(t), words(r)) for r in training) for t in texts]
    found = count_copies(texts, training, run=7)
    assert found.sensitive_indices == tuple(i for i, r in enumerate(runs) if r >= 7)
    assert found.longest_run == max(runs) and found.exact == 1 and found.near >= 2


def test_chinese_needs_twice_the_characters():
    record = "患者主诉胸痛三天伴有气短和乏力"
    assert count_copies([f"今天{record[:9]}。"], [record], run=5).near == 0
    assert count_copies([f"今天{record[:10]}。"], [record], run=5).near == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Call 555-123-4567 now", True),
        ("Call (555) 123 4567", True),
        ("Call 5551234567.", True),
        ("Call ５５５-123-4567", True),
        ("Call 1555-123-4567", False),
        ("Call 555-123-45678", False),
        ("Call 555-123-456", False),
        ("ask MARY  o'brien", True),
        ("ask Maryo'brien", False),
        ("ask mary o'briens", False),
        ("病人王小明明天来", True),
    ],
)
def test_secrets_are_found_where_they_stand_whole(text, found):
    result = count_secrets([text, "nothing"], ["555-123-4567", "Mary O'Brien", "王小明明"])
    assert result.num_texts_with_secret == int(found) == result.num_secrets_found
    assert result.num_secrets == 3


def test_short_secrets_are_refused_without_being_printed():
    with pytest.raises(DpjaxError, match="secret 1 has 3") as caught:
        count_secrets(["x"], ["long enough", "abc"])
    assert "abc" not in str(caught.value)


def test_many_secrets_in_many_texts():
    records = domain_records("financial", 300, seed=1)
    secrets = [s.value for r in records for s in r.spans if s.kind in ("phone", "account")]
    found = count_secrets([r.text for r in records[:100]], secrets)
    own = {s.value for r in records[:100] for s in r.spans if s.kind in ("phone", "account")}
    assert set(found.sensitive_found) == own and len(own) > 50
