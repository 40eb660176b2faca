"""Which part of a text stands word for word, or nearly so, in a corpus."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpjax.errors import DpjaxError

_DOUBLINGS = 40  # more than any corpus in memory needs


class Match(NamedTuple):
    """The longest part of one text that a corpus holds; all zero if they share nothing."""

    length: int  # characters or tokens
    start: int  # in the text
    document: int  # of the corpus
    document_start: int


class SuffixIndex:
    """A suffix array of a corpus: finds the longest verbatim match of any text.

    Memory is about 30 bytes for each character or token while it is built, 12 after.

    Args:
      documents: texts, or sequences of token ids; a match never crosses from one into the next.

    Raises:
      DpjaxError: no documents, or token ids that are negative.

    Source: Manber and Myers (1993), prefix doubling; Lee et al. (2022), *Deduplicating training
      data makes language models better*, for the use.

    Example:
      >>> index = SuffixIndex(["call 555-0100 now", "my name is Ann"])
      >>> index.longest_match("the name is Anna")
      Match(length=12, start=3, document=1, document_start=2)
    """

    def __init__(self, documents: Sequence[str] | Sequence[Sequence[int]]):
        parts = [_symbols(document) for document in documents]
        if not parts:
            raise DpjaxError("the corpus has no documents; give at least one")
        # Every document ends in a symbol that no text holds, so that no match can cross it.
        self._starts = np.cumsum([0, *(len(part) + 1 for part in parts)])[:-1]
        whole = np.concatenate([x for part in parts for x in (part + 1, np.zeros(1, np.int64))])
        self._order = _suffix_array(whole)
        # Big-endian, so that comparing bytes compares symbols.
        self._text = whole.astype(">u4").tobytes()

    def longest_match(self, text: str | Sequence[int]) -> Match:
        """The longest part of ``text`` that some document holds; of equal ones the text's first.

        Example:
          >>> SuffixIndex([[1, 2, 3, 4]]).longest_match([9, 2, 3, 9])
          Match(length=2, start=1, document=0, document_start=1)
        """
        symbols = (_symbols(text) + 1).astype(">u4").tobytes()
        best, where = 0, (0, 0)
        for start in range(len(symbols) // 4):
            # Only what would beat the best so far needs a search.
            if start + best >= len(symbols) // 4:
                break
            if self._find(symbols, start, best + 1) is None:
                continue
            low, high = best + 1, len(symbols) // 4 - start
            while low < high:
                middle = (low + high + 1) // 2
                if self._find(symbols, start, middle) is None:
                    high = middle - 1
                else:
                    low = middle
            found = self._find(symbols, start, low)
            assert found is not None
            best, where = low, (start, found)
        if best == 0:
            return Match(0, 0, 0, 0)
        document = int(np.searchsorted(self._starts, where[1], side="right")) - 1
        return Match(best, where[0], document, where[1] - int(self._starts[document]))

    def contains(self, text: str | Sequence[int]) -> bool:
        """Whether some document holds all of ``text``.

        Example:
          >>> index = SuffixIndex(["ab", "cd"])
          >>> index.contains("cd"), index.contains("bc")
          (True, False)
        """
        symbols = (_symbols(text) + 1).astype(">u4").tobytes()
        return self._find(symbols, 0, len(symbols) // 4) is not None

    def _find(self, symbols: bytes, start: int, length: int) -> int | None:
        """A place of the corpus where this part stands; None if there is none."""
        part = symbols[4 * start : 4 * (start + length)]
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high) // 2
            at = 4 * int(self._order[middle])
            if self._text[at : at + len(part)] < part:
                low = middle + 1
            else:
                high = middle
        if low == len(self._order):
            return None
        at = 4 * int(self._order[low])
        return at // 4 if self._text[at : at + len(part)] == part else None


def _symbols(text: str | Sequence[int]) -> np.ndarray:
    """Code points or token ids, int64."""
    if isinstance(text, str):
        # Lone surrogates occur in broken text; they are symbols like others.
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    found = np.asarray(text, np.int64)
    if found.ndim != 1 or np.any(found < 0) or np.any(found >= 2**31):
        raise DpjaxError("a document is neither text nor a row of token ids of at least 0")
    return found


def _suffix_array(symbols: np.ndarray) -> np.ndarray:
    """Starts of all suffixes in lexicographic order: int64[n]."""
    n = len(symbols)
    _, rank = np.unique(symbols, return_inverse=True)
    rank = rank.astype(np.int64)
    width = 1
    order = np.argsort(rank, kind="stable")
    for _ in range(_DOUBLINGS):
        # Rank of the first 2 * width symbols, from the ranks of both halves; past the end is least.
        second = np.zeros(n, np.int64)
        second[: n - width] = rank[width:] + 1 if width < n else 0
        both = rank * (n + 1) + second
        order = np.argsort(both, kind="stable")
        arranged = both[order]
        fresh = np.concatenate([[0], np.cumsum(arranged[1:] != arranged[:-1])])
        rank = np.empty(n, np.int64)
        rank[order] = fresh
        width *= 2
        if fresh[-1] == n - 1 or width >= n:
            break
    return order


class NearDuplicate(NamedTuple):
    """Two texts that share most of their shingles."""

    text: int  # which of the texts
    document: int  # which of the corpus
    similarity: float  # exact Jaccard similarity of their shingles


def near_duplicates(
    texts: Sequence[str],
    corpus: Sequence[str],
    *,
    threshold: float = 0.8,
    shingle_words: int = 3,
    num_permutations: int = 128,
    seed: int = 1,
) -> list[NearDuplicate]:
    """Pairs of a text and a document whose word shingles are alike: Jaccard similarity.

    Candidates come from MinHash with locality-sensitive hashing (the `datasketch` library); each is
    then verified exactly, so that none is reported wrongly; near the threshold some may be missed.

    Args:
      texts, corpus: compared with each other; case and space do not count.
      threshold: in (0, 1].
      shingle_words: words in a shingle; a shorter text is one shingle.
      num_permutations: more find more of the pairs near the threshold.
      seed: of the permutations.

    Raises:
      DpjaxError: datasketch is missing, or a threshold outside (0, 1].

    Source: Broder (1997); Lee et al. (2022), section 4.2.

    Example:
      >>> found = near_duplicates(["the cat sat on the mat today"],
      ...                         ["a dog", "The cat sat on the mat"], threshold=0.7)
      >>> found[0].document, found[0].similarity
      (1, 0.8)
    """
    if not 0 < threshold <= 1:
        raise DpjaxError(f"threshold is {threshold}; it must be in (0, 1]")
    if shingle_words < 1:
        raise DpjaxError(f"shingle_words is {shingle_words}; it must be at least 1")
    sketch = _datasketch()
    corpus_shingles = [_shingles(text, shingle_words) for text in corpus]
    # The sketch may propose too many, which the exact check drops, but should miss next to none.
    known = sketch.MinHashLSH(threshold=threshold, num_perm=num_permutations, weights=(0.02, 0.98))
    minhash = {"num_perm": num_permutations, "seed": seed}
    for number, shingles in enumerate(corpus_shingles):
        if shingles:
            known.insert(number, _minhash(sketch, shingles, minhash))
    found = []
    for number, text in enumerate(texts):
        shingles = _shingles(text, shingle_words)
        if not shingles:
            continue
        for document in sorted(known.query(_minhash(sketch, shingles, minhash))):
            other = corpus_shingles[document]
            similarity = len(shingles & other) / len(shingles | other)
            if similarity >= threshold:
                found.append(NearDuplicate(number, int(document), similarity))
    return found


def _shingles(text: str, count: int) -> set[bytes]:
    words = text.lower().split()
    if not words:
        return set()
    return {" ".join(words[n : n + count]).encode() for n in range(max(1, len(words) - count + 1))}


def _minhash(sketch: Any, shingles: set[bytes], settings: dict[str, int]) -> Any:
    found = sketch.MinHash(**settings)
    found.update_batch(sorted(shingles))
    return found


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise DpjaxError(
            "near duplicates need the datasketch package; install dpjax[auditing]"
        ) from None
    return datasketch
