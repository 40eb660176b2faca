"""How good synthetic text records are, measured against real ones.

Everything here reads real records, so no result is covered by any epsilon: it is for the owner of
the records, not for release.
"""

from __future__ import annotations

import importlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from dpjax.errors import DpjaxError

# A word is a run of letters and digits; a character of a script without spaces is a word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[\s\-‐-―./()·]+(?=\d)")


def words(text: str) -> list[str]:
    """Words in lower case; each Chinese, Japanese or Korean character is one.

    Example:
      >>> words("Take 2 pills, 每天")
      ['take', '2', 'pills', '每', '天']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Accuracy(NamedTuple):
    """How often a classifier was right on real records."""

    accuracy: float
    low: float  # Wilson interval, 95%
    high: float
    num_train: int
    num_test: int
    per_label: dict[str, float]


def downstream_accuracy(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    test_texts: Sequence[str],
    test_labels: Sequence[str],
    seed: int = 0,
) -> Accuracy:
    """Accuracy on real records of a classifier trained on these records.

    TF-IDF of words, pairs of words and runs of 2 to 4 characters, then logistic regression. Train
    it once on synthetic and once on real records: the difference is what synthesis cost.

    Args:
      train_texts, train_labels: e.g. synthetic records.
      test_texts, test_labels: real records that nothing was trained on.
      seed: of the solver.

    Raises:
      DpjaxError: no records, lengths that differ, or scikit-learn is missing.

    Example:
      >>> found = downstream_accuracy(
      ...     ["my heart aches", "chest pain", "a broken leg", "my arm broke"], [*"hhbb"],
      ...     ["pain in the heart", "the leg is broken"], [*"hb"])
      >>> found.accuracy, found.num_test
      (1.0, 2)
    """
    for name, texts, labels in (
        ("train", train_texts, train_labels),
        ("test", test_texts, test_labels),
    ):
        if not texts or len(texts) != len(labels):
            raise DpjaxError(
                f"{name} has {len(texts)} texts and {len(labels)} labels; give one label for each "
                "text, and at least one"
            )
    known = sorted(set(train_labels))
    if len(known) == 1:
        predicted = known * len(test_texts)
    else:
        text = _sklearn("feature_extraction.text")
        features = _sklearn("pipeline").make_union(
            text.TfidfVectorizer(analyzer=_word_features, sublinear_tf=True),
            text.TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
        )
        model = _sklearn("pipeline").make_pipeline(
            features,
            _sklearn("linear_model").LogisticRegression(C=10.0, max_iter=2000, random_state=seed),
        )
        predicted = model.fit(list(train_texts), list(train_labels)).predict(list(test_texts))
    right = np.array([a == b for a, b in zip(predicted, test_labels, strict=True)])
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    per_label = {
        label: float(np.mean([r for r, of in zip(right, test_labels, strict=True) if of == label]))
        for label in sorted(set(test_labels))
    }
    return Accuracy(
        float(right.mean()),
        float(interval.low),
        float(interval.high),
        len(train_texts),
        len(test_texts),
        per_label,
    )


def _word_features(text: str) -> list[str]:
    found = words(text)
    return [*found, *(f"{a} {b}" for a, b in itertools.pairwise(found))]


def _sklearn(name: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError:
        raise DpjaxError(
            "scikit-learn is missing and measures quality; run: pip install 'dpjax[quality]'"
        ) from None


class Divergence(NamedTuple):
    """How far two sets of texts are apart, in both directions."""

    mauve: float  # area under the frontier, 1 for equal distributions, towards 0 for disjoint ones
    frontier: Float[np.ndarray, "points 2"]  # exp(-c KL(q|mixture)), exp(-c KL(p|mixture))
    num_clusters: int


def divergence(
    real_embeddings: Float[np.ndarray, "n d"],
    synthetic_embeddings: Float[np.ndarray, "m d"],
    num_clusters: int | None = None,
    seed: int = 0,
) -> Divergence:
    """A MAUVE-like score: both sets quantised together, and a frontier of divergences.

    The steps of Pillutla et al. (2021), section 3: unit vectors, principal components with 90% of
    the variance, k-means over both, then ``exp(-5 KL)`` to every mixture. Counts are smoothed by
    one half (Krichevsky-Trofimov; Pillutla et al., 2023). The embeddings are not the published
    ones, so compare scores only with each other.

    Args:
      real_embeddings, synthetic_embeddings: e.g. of `dpjax.evaluation.embed_texts`.
      num_clusters: default: a tenth of the smaller set, at least 2.
      seed: of k-means.

    Raises:
      DpjaxError: fewer than 2 vectors, widths that differ, or values that are not finite.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> near = divergence(rng.normal(size=(400, 4)), rng.normal(size=(400, 4)), 8)
      >>> far = divergence(rng.normal(size=(400, 4)) + 9, rng.normal(size=(400, 4)) - 9, 8)
      >>> near.mauve > 0.9, far.mauve < 0.1
      (True, True)
    """
    real, synthetic = (np.asarray(e, np.float64) for e in (real_embeddings, synthetic_embeddings))
    sizes = [e.shape for e in (real, synthetic)]
    if any(len(s) != 2 or s[0] < 2 for s in sizes) or sizes[0][1] != sizes[1][1]:
        raise DpjaxError(f"embeddings have shapes {sizes}; give [texts, width], at least 2 texts")
    both = np.concatenate([real, synthetic])
    if not np.isfinite(both).all():
        raise DpjaxError("an embedding holds NaN or infinity; leave that text out")
    both = both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)
    clusters = num_clusters or max(2, min(len(real), len(synthetic)) // 10)
    clusters = min(clusters, len(np.unique(both, axis=0)))
    if min(both.shape) > 1 and np.ptp(both, axis=0).max() > 0:
        both = _sklearn("decomposition").PCA(0.9, svd_solver="full").fit_transform(both)
    found = _sklearn("cluster").KMeans(clusters, n_init=5, random_state=seed).fit_predict(both)
    counts = [np.bincount(part, minlength=clusters) for part in np.split(found, [len(real)])]
    p, q = ((c + 0.5) / (c.sum() + 0.5 * clusters) for c in counts)
    frontier = _frontier(p, q)
    x, y = frontier.T
    # Both ways of integrating, as published: the curve has no preferred axis.
    area = 0.5 * (abs(np.trapezoid(y, x)) + abs(np.trapezoid(x, y)))
    return Divergence(float(min(1.0, area)), frontier, clusters)


def _frontier(p: np.ndarray, q: np.ndarray, scaling: float = 5.0) -> np.ndarray:
    # From the mixture that is all q to the one that is all p.
    points: list[tuple[float, ...]] = [(1.0, 0.0)]
    for weight in np.linspace(1e-6, 1 - 1e-6, 100):
        mixture = weight * p + (1 - weight) * q
        points.append(tuple(float(np.exp(-scaling * stats.entropy(of, mixture))) for of in (q, p)))
    return np.array([*points, (0.0, 1.0)])


class TextStatistics(NamedTuple):
    """Counts of a set of texts."""

    num_texts: int
    words_mean: float
    words_quantiles: tuple[float, ...]  # 5%, 25%, 50%, 75%, 95%
    characters_mean: float
    distinct: tuple[float, ...]  # distinct n-grams / n-grams, for n = 1, 2, 3
    duplicate_share: float  # texts that equal an earlier one
    empty_share: float


def text_statistics(texts: Sequence[str]) -> TextStatistics:
    """Lengths, variety and repetition of texts.

    Raises:
      DpjaxError: no texts.

    Example:
      >>> found = text_statistics(["a b a", "a b a"])
      >>> found.words_mean, found.duplicate_share, found.distinct[0]
      (3.0, 0.5, 0.3333333333333333)
    """
    if not texts:
        raise DpjaxError("there are no texts; give at least one")
    split = [words(text) for text in texts]
    lengths = np.array([len(found) for found in split])
    distinct = []
    for n in (1, 2, 3):
        grams = [gram for found in split for gram in _ngrams(found, n)]
        distinct.append(len(set(grams)) / max(1, len(grams)))
    return TextStatistics(
        len(texts),
        float(lengths.mean()),
        tuple(np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()),
        float(np.mean([len(text) for text in texts])),
        tuple(distinct),
        1 - len(set(texts)) / len(texts),
        float(np.mean([not text.strip() for text in texts])),
    )


def _ngrams(found: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(found[i:] for i in range(n)), strict=False)


class StatisticsDifference(NamedTuple):
    """How two sets of texts differ in form."""

    words_wasserstein: float  # words
    unigram_divergence: float  # Jensen-Shannon, bits: 0 equal, 1 disjoint
    bigram_divergence: float
    new_trigram_share: float  # of the synthetic trigrams, those in no real text


def compare_statistics(real: Sequence[str], synthetic: Sequence[str]) -> StatisticsDifference:
    """Distances between lengths and between word distributions.

    Raises:
      DpjaxError: no texts on one side.

    Example:
      >>> found = compare_statistics(["a b", "a b"], ["a b", "c d"])
      >>> found.words_wasserstein, round(found.unigram_divergence, 3)
      (0.0, 0.311)
    """
    if not real or not synthetic:
        raise DpjaxError(
            f"there are {len(real)} real and {len(synthetic)} synthetic texts; give some"
        )
    split = [[words(text) for text in texts] for texts in (real, synthetic)]
    lengths = [[len(found) for found in texts] for texts in split]
    grams = {
        n: [Counter(g for found in texts for g in _ngrams(found, n)) for texts in split]
        for n in (1, 2, 3)
    }
    new = sum(count for gram, count in grams[3][1].items() if gram not in grams[3][0])
    return StatisticsDifference(
        float(stats.wasserstein_distance(*lengths)),
        _jensen_shannon(*grams[1]),
        _jensen_shannon(*grams[2]),
        new / max(1, grams[3][1].total()),
    )


def _jensen_shannon(a: Counter, b: Counter) -> float:
    keys = [*a.keys() | b.keys()]
    if not keys:
        return 0.0
    p, q = (np.array([c[k] for k in keys], float) / max(1, c.total()) for c in (a, b))
    middle = 0.5 * (p + q)
    halves = [np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0])) for x in (p, q)]
    return float(np.clip(0.5 * sum(halves), 0.0, 1.0))


class Copies(NamedTuple):
    """How much of a set of texts stands in another, word by word."""

    exact: int  # texts that equal one of the others, but for case and spacing
    near: int  # texts that share at least `run` consecutive words with one of the others
    longest_run: int  # words
    num_texts: int
    sensitive_indices: tuple[int, ...]  # of the near ones


def count_copies(texts: Sequence[str], training: Sequence[str], run: int = 8) -> Copies:
    """Counts texts that repeat training records, in whole or in part.

    A number means little alone: records of one kind share phrases. Count the same against records
    that were held out, which nothing could have been copied from, and compare.

    Args:
      texts: e.g. synthetic records.
      training: records that the model was trained on (or, for comparison, held-out ones).
      run: consecutive words that count as a copy; twice as many characters in Chinese.

    Returns:
      Counts; ``longest_run`` is exact from ``run`` words on, and 0 below.

    Raises:
      DpjaxError: ``run`` below 2.

    Example:
      >>> found = count_copies(["Call me at noon.", "we went out to the sea yesterday"],
      ...                      ["call me  at noon", "they went out to the sea"], run=5)
      >>> found.exact, found.near, found.longest_run, found.sensitive_indices
      (1, 1, 5, (1,))
    """
    if run < 2:
        raise DpjaxError(f"run is {run}; it must be at least 2 words, e.g. 8")
    wholes = {" ".join(words(text)) for text in training}
    grams: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    split = [words(text) for text in training]
    for number, found in enumerate(split):
        for at, gram in enumerate(_ngrams(found, run)):
            grams.setdefault(gram, []).append((number, at))
    exact, longest, near = 0, 0, []
    for index, text in enumerate(texts):
        found = words(text)
        exact += bool(found) and " ".join(found) in wholes
        most = 0
        best = 0
        for at, gram in enumerate(_ngrams(found, run)):
            for number, place in grams.get(gram, ()):
                # Only where a shared run begins: it cannot be longer from its second word on.
                if at and place and found[at - 1] == split[number][place - 1]:
                    continue
                shared = run
                other = split[number]
                while (
                    at + shared < len(found)
                    and place + shared < len(other)
                    and found[at + shared] == other[place + shared]
                ):
                    shared += 1
                most = max(most, shared)
                best = max(best, _weight(found[at : at + shared]))
        longest = max(longest, most)
        if best >= 2 * run:
            near.append(index)
    return Copies(exact, len(near), longest, len(texts), tuple(near))


def _weight(found: list[str]) -> int:
    """Words count two, characters of scripts without spaces one."""
    return sum(1 if re.fullmatch(f"[{_CJK}]", word) else 2 for word in found)


class SecretsFound(NamedTuple):
    """Which known secrets stand in a set of texts."""

    num_secrets: int  # asked for
    num_secrets_found: int
    num_texts_with_secret: int
    sensitive_found: tuple[str, ...]


def count_secrets(texts: Sequence[str], secrets: Sequence[str]) -> SecretsFound:
    """Counts secrets (phone numbers, names, accounts) that texts give away.

    A secret is found where it stands between word boundaries, whatever the case and whatever
    separates its digits.

    Raises:
      DpjaxError: a secret shorter than 4 characters, which would be found by chance.

    Example:
      >>> found = count_secrets(["call 555 123-4567 now", "id 95551234567"], ["555-123-4567"])
      >>> found.num_secrets_found, found.num_texts_with_secret
      (1, 1)
    """
    normal: dict[str, str] = {}
    for index, secret in enumerate(secrets):
        text = _normal(secret)
        if len(text) < 4:
            raise DpjaxError(f"secret {index} has {len(text)} characters; 4 or more are needed")
        normal[text] = secret
    found: set[str] = set()
    with_secret = 0
    # One look-up for each place and length, instead of one search for each secret.
    lengths = sorted({len(text) for text in normal})
    for text in map(_normal, texts):
        here = set()
        for at in range(len(text)):
            if at and _joined(text[at - 1], text[at]):
                continue
            for length in lengths:
                end = at + length
                part = text[at:end]
                if end > len(text):
                    break
                if part in normal and (end == len(text) or not _joined(text[end - 1], text[end])):
                    here.add(part)
        with_secret += bool(here)
        found |= here
    return SecretsFound(
        len(normal), len(found), with_secret, tuple(sorted(normal[text] for text in found))
    )


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_BETWEEN_DIGITS.sub("", folded).split())


def _joined(before: str, after: str) -> bool:
    """Whether no word boundary lies between two characters; Chinese characters have one each."""
    if re.match(f"[{_CJK}]", before) or re.match(f"[{_CJK}]", after):
        return False
    return (before.isdigit() and after.isdigit()) or (before.isalpha() and after.isalpha())
