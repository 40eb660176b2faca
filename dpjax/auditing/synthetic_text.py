"""Audits of synthetic text alone: is a canary's echo in records that a private model wrote?

The attacker sees neither the model nor its probabilities, only the released texts (threat view Y).
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from scipy import sparse

from dpjax.auditing.canaries import CanarySet
from dpjax.auditing.curves import attack_result
from dpjax.auditing.results import AttackResult
from dpjax.data import Record, Tokenizer
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.models import DecoderConfig
from dpjax.quality import words
from dpjax.types import PyTree, RandomKey

_SEPARATOR = "\x00"  # stands before a text's first word; no word holds it


def ngram_scores(
    synthetic: Sequence[str],
    canaries: Sequence[str],
    *,
    order: int = 2,
    smoothing: float = 1.0,
) -> np.ndarray:
    """Mean log-probability of each canary's words under an n-gram model of the synthetic texts.

    Args:
      synthetic: the released texts.
      canaries: N texts of at least one word.
      order: n, at least 1; the paper finds 2 best.
      smoothing: added to every count; above 0.

    Returns:
      float64[N], nats for a word, higher = more of it is in the texts.

    Source: Meeus et al. (2025), *The canary's echo: auditing privacy risks of LLM-generated
      synthetic text*, section 3.2.

    Example:
      >>> found = ngram_scores(["the cat sat", "a dog"], ["the cat", "the fox"])
      >>> bool(found[0] > found[1])
      True
    """
    _checked(synthetic, canaries)
    if order < 1 or not smoothing > 0:
        raise DpjaxError(f"order is {order} and smoothing {smoothing}; use at least 1, and above 0")
    split = [words(text) for text in canaries]
    empty = next((number for number, found in enumerate(split) if not found), None)
    if empty is not None:
        raise DpjaxError(f"canary {empty} has no words; it cannot be looked for")
    texts = [words(text) for text in synthetic]
    # Words of the canaries belong to it, or a new word would have no probability at all.
    vocabulary = {word for text in (*texts, *split) for word in text}
    grams: Counter[tuple[str, ...]] = Counter()
    contexts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for gram in _padded(text, order):
            grams[gram] += 1
            contexts[gram[:-1]] += 1
    extra = smoothing * len(vocabulary)
    scores = []
    for canary in split:
        logs = [
            np.log((grams[gram] + smoothing) / (contexts[gram[:-1]] + extra))
            for gram in _padded(canary, order)
        ]
        scores.append(float(np.mean(logs)))
    return np.array(scores)


def similarity_scores(
    synthetic: Sequence[str],
    canaries: Sequence[str],
    *,
    nearest: int = 25,
    order: int = 1,
) -> np.ndarray:
    """Mean Jaccard similarity of each canary with the synthetic texts that are most like it.

    Args:
      synthetic: the released texts.
      canaries: N texts.
      nearest: texts averaged over; all if there are fewer.
      order: compares sets of runs of this many words.

    Returns:
      float64[N], from 0 to 1.

    Source: Meeus et al. (2025), section 3.2, with k = 25.

    Example:
      >>> similarity_scores(["red green blue", "one two"], ["red green", "two"], nearest=1)
      array([0.66666667, 0.5       ])
    """
    _checked(synthetic, canaries)
    if nearest < 1 or order < 1:
        raise DpjaxError(f"nearest is {nearest} and order {order}; both must be at least 1")
    known: dict[tuple[str, ...], int] = {}
    held, wanted = (
        _incidence([_runs(words(text), order) for text in texts], known)
        for texts in (synthetic, canaries)
    )
    # The second matrix may know more columns than the first.
    held.resize((len(synthetic), len(known)))
    shared = (wanted @ held.T).toarray()
    own, other = (np.asarray(m.sum(axis=1)).ravel() for m in (wanted, held))
    sizes = own[:, None] + other[None, :] - shared
    similarity = np.divide(shared, sizes, out=np.zeros_like(shared), where=sizes > 0)
    count = min(nearest, similarity.shape[1])
    return np.sort(similarity, axis=1)[:, -count:].mean(axis=1)


def synthetic_text_attacks(
    synthetic: Sequence[str],
    in_canaries: Sequence[str],
    out_canaries: Sequence[str],
    *,
    references: Sequence[Sequence[str]] = (),
    order: int = 2,
    nearest: int = 25,
    confidence: float = 0.95,
) -> list[AttackResult]:
    """Membership inference from synthetic text, by both signals.

    Args:
      synthetic: the released texts.
      in_canaries, out_canaries: texts that were in the training records, and twins that were not.
      references: synthetic corpora of the same pipeline trained without any of them; their mean
        score is subtracted, so that a canary of common words is not taken for a member.
      order: of the n-grams.
      nearest: texts averaged over in the similarity.
      confidence: of the intervals.

    Returns:
      "synthetic n-gram" and "synthetic similarity", threat view Y.

    Source: Meeus et al. (2025), sections 3.1 and 3.2.

    Example:
      >>> found = synthetic_text_attacks(["my code is 4711"] * 3, ["code is 4711"], ["code is 8"])
      >>> [(r.attack, r.metrics["auc"].value, r.threat_view) for r in found]
      [('synthetic n-gram', 1.0, 'Y'), ('synthetic similarity', 1.0, 'Y')]
    """
    both = [*in_canaries, *out_canaries]
    signals = {
        "synthetic n-gram": lambda texts: ngram_scores(texts, both, order=order),
        "synthetic similarity": lambda texts: similarity_scores(texts, both, nearest=nearest),
    }
    notes = ["the attacker sees the synthetic texts only"]
    if references:
        notes.append(f"and {len(references)} corpora made the same way without the canaries")
    results = []
    for name, signal in signals.items():
        scores = signal(synthetic)
        if references:
            scores = scores - np.mean([signal(texts) for texts in references], axis=0)
        inside, outside = np.split(scores, [len(in_canaries)])
        results.append(
            attack_result(
                name,
                inside,
                outside,
                threat_view="Y",
                assumptions=notes,
                confidence=confidence,
                details={"texts": len(synthetic), "references": len(references)},
            )
        )
    return results


def echo_canaries(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    key: RandomKey,
    *,
    num: int,
    num_held_out: int,
    prefix_tokens: int = 10,
    suffix_tokens: int = 30,
    temperature: float = 2.0,
    repetitions: int = 1,
    labels: Sequence[str] | None = None,
) -> CanarySet:
    """Canaries that a synthetic-text generator can echo: an ordinary beginning, an odd end.

    An unlikely text all through is never generated, so that its trace is not seen; one that begins
    like the others is, and then goes on as only training on it would.

    Args:
      config, params, tokenizer: a public model, e.g. the one before fine-tuning.
      texts: public texts like the private ones; canary i begins as ``texts[i]`` does, in turn.
      key: JAX random key. Keep it: it is the answer key.
      num, num_held_out: canaries to put in, and twins, drawn alike.
      prefix_tokens, suffix_tokens: tokens of the two parts.
      temperature: of the end; higher is odder.
      repetitions: records of each canary.
      labels: a control code for each text, if the records have labels.

    Returns:
      A `CanarySet` of kind "echo", for `dpjax.auditing.insert` into records.

    Source: Meeus et al. (2025), section 5.3.

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> found = echo_canaries(config, init_params(config, jax.random.key(0)), byte_tokenizer(),
      ...     ["The patient walked in."], jax.random.key(1), num=2, num_held_out=1)
      >>> found, found.in_[0].text.startswith("The patien")
      (CanarySet('echo', in_=2, held_out=1), True)
    """
    if min(num, num_held_out, prefix_tokens, suffix_tokens, repetitions) < 1 or not texts:
        raise DpjaxError(
            f"num is {num}, num_held_out {num_held_out}, prefix_tokens {prefix_tokens}, "
            f"suffix_tokens {suffix_tokens}, repetitions {repetitions}, with {len(texts)} texts; "
            "each must be at least 1"
        )
    if labels is not None and len(labels) != len(texts):
        raise DpjaxError(f"{len(labels)} labels for {len(texts)} texts; give one for each")
    total = num + num_held_out
    starts = [
        [tokenizer.bos_id, *tokenizer.encode(texts[n % len(texts)])[:prefix_tokens]]
        for n in range(total)
    ]
    drawn = generate(
        config,
        params,
        starts,
        key,
        max_new_tokens=suffix_tokens,
        temperature=temperature,
        stop_token=tokenizer.eos_id,
    )
    made = [
        tokenizer.decode([*start[1:], *tokens]) for start, tokens in zip(starts, drawn, strict=True)
    ]
    # One order for both sides, so that nothing but the coin tells a canary from a twin.
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 1), total))
    records = [
        Record(
            made[n],
            f"canary:echo:{place}",
            None if labels is None else labels[int(n) % len(texts)],
        )
        for place, n in enumerate(order.tolist())
    ]
    return CanarySet(
        "echo",
        tuple(records[:num]),
        tuple(records[num:]),
        np.full(num, repetitions, np.int64),
        tuple(str(record.user) for record in records[:num]),
        np.full(num, np.nan),
    )


def _padded(text: list[str], order: int) -> Iterable[tuple[str, ...]]:
    padded = [_SEPARATOR] * (order - 1) + text
    return zip(*(padded[n : len(padded) - order + 1 + n] for n in range(order)), strict=True)


def _runs(text: list[str], order: int) -> set[tuple[str, ...]]:
    return {tuple(text[n : n + order]) for n in range(len(text) - order + 1)}


def _incidence(
    sets: Sequence[set[tuple[str, ...]]], known: dict[tuple[str, ...], int]
) -> sparse.csr_array:
    """One row for each set, one column for each element of any; ``known`` grows."""
    rows, columns = [], []
    for row, elements in enumerate(sets):
        for element in elements:
            rows.append(row)
            columns.append(known.setdefault(element, len(known)))
    return sparse.csr_array(
        (np.ones(len(rows)), (rows, columns)), shape=(len(sets), len(known)), dtype=np.float64
    )


def _checked(synthetic: Sequence[str], canaries: Sequence[str]) -> None:
    if not len(synthetic) or not len(canaries):
        raise DpjaxError(
            f"there are {len(synthetic)} synthetic texts and {len(canaries)} canaries; both must be"
            " at least 1"
        )
