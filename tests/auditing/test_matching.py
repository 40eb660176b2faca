"""Verbatim matches against a slow reference, near duplicates against exact similarities."""

import difflib
import sys

import numpy as np
import pytest

from dpjax.auditing.matching import Match, SuffixIndex, near_duplicates
from dpjax.errors import DpjaxError


def slow_longest(text, documents):
    """Longest common substring by trying them all."""
    best = 0
    for document in documents:
        matcher = difflib.SequenceMatcher(None, text, document, autojunk=False)
        best = max(best, matcher.find_longest_match().size)
    return best


def test_longest_match_against_difflib():
    rng = np.random.default_rng(0)
    for _ in range(60):
        letters = "ab" if rng.random() < 0.5 else "abcdefgh"
        documents = ["".join(rng.choice(list(letters), rng.integers(0, 30))) for _ in range(4)]
        text = "".join(rng.choice(list(letters), rng.integers(0, 25)))
        found = SuffixIndex(documents).longest_match(text)
        assert found.length == slow_longest(text, documents)
        there = documents[found.document][found.document_start :][: found.length]
        assert text[found.start :][: found.length] == there


def test_matches_do_not_cross_documents():
    index = SuffixIndex(["abc", "def", ""])
    assert index.longest_match("bcde").length == 2
    assert not index.contains("cd") and index.contains("def") and index.contains("")
    assert index.longest_match("xyz") == Match(0, 0, 0, 0)
    assert index.longest_match("") == Match(0, 0, 0, 0)


def test_tokens_and_odd_characters():
    index = SuffixIndex([[0, 70000, 5, 5, 5], [5, 5]])
    assert index.longest_match([1, 70000, 5, 5, 9]) == Match(3, 1, 0, 1)
    assert index.longest_match([0]).length == 1
    # Order of bytes is order of symbols beyond 255 too.
    wide = SuffixIndex([[256, 1, 255, 3, 65536, 2]])
    assert all(wide.contains([a]) for a in (256, 1, 255, 3, 65536, 2)) and not wide.contains([0])
    text = SuffixIndex(["电话是 555，谢谢 \U0001f600 \ud800"])
    assert text.longest_match("的电话是 555。").length == 7
    assert text.longest_match("\U0001f600 \ud800").length == 3


def test_repetitions_and_a_large_corpus():
    # Repeated documents need every doubling; a wrong rank shows here first.
    index = SuffixIndex(["the same text again and again"] * 50 + ["a" * 1000])
    assert index.longest_match("the same text again and agaIn").length == 27
    assert index.longest_match("a" * 1001).length == 1000
    rng = np.random.default_rng(1)
    corpus = rng.integers(0, 50_000, 200_000).tolist()
    large = SuffixIndex([corpus[:120_000], corpus[120_000:]])
    planted = [3, *corpus[150_000:150_060], 7]
    assert large.longest_match(planted) == Match(60, 1, 1, 30_000)


def test_near_duplicates_are_verified():
    rng = np.random.default_rng(2)
    words = [f"w{n}" for n in range(2000)]
    corpus = [" ".join(rng.choice(words, 60)) for _ in range(200)]
    copied = []
    for number in range(20):
        changed = corpus[number].split()
        changed[30] = "changed"
        copied.append(" ".join(changed).upper())
    fresh = [" ".join(rng.choice(words, 60)) for _ in range(20)]
    found = near_duplicates(copied + fresh, corpus, threshold=0.8)
    assert [(f.text, f.document) for f in found] == [(n, n) for n in range(20)]
    # One changed word is in 3 of 58 shingles on either side.
    assert all(f.similarity == pytest.approx(55 / 61) for f in found)
    assert near_duplicates([""], ["", "a b c"]) == []
    # By single words, order does not count; by pairs "a b c d" and "d a b c" share 2 of 4.
    for size, similarity in ((1, 1.0), (2, 0.5)):
        settings = {"threshold": 0.4, "shingle_words": size, "num_permutations": 256}
        (swapped,) = near_duplicates(["d a b c"], ["x y", "a b c d"], **settings)
        assert (swapped.document, swapped.similarity) == (1, similarity)
    # Raising the bar past the similarity finds none, though the sketch still proposes them.
    assert near_duplicates(copied, corpus, threshold=0.95) == []


def test_refusals(monkeypatch):
    with pytest.raises(DpjaxError, match="no documents"):
        SuffixIndex([])
    with pytest.raises(DpjaxError, match="token ids"):
        SuffixIndex([[-1]])
    with pytest.raises(DpjaxError, match="threshold is 1.5"):
        near_duplicates(["a"], ["a"], threshold=1.5)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DpjaxError, match=r"install dpjax\[auditing\]"):
        near_duplicates(["a"], ["a"])
