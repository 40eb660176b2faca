"""Untargeted extraction: generate much, rank by suspicion, compare with a corpus."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpjax.auditing.matching import Match, SuffixIndex
from dpjax.auditing.scoring import token_statistics
from dpjax.data import Record, Tokenizer, dataset_from_records
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.models import DecoderConfig
from dpjax.types import PyTree, RandomKey


class RankedTexts(NamedTuple):
    """N distinct generated texts and how suspicious each is, by each measure.

    ``scores`` maps a measure to float64[N], higher = more like something memorised:

    * "perplexity": mean log-probability of a token, nats.
    * "zlib": the same sum divided by the bytes of the compressed text.
    * "lowercase": mean log-probability minus that of the text in lower case.
    * "window": the highest mean log-probability of any window of tokens.
    * "reference": mean log-probability minus that under a reference model, if one was given.
    """

    texts: tuple[str, ...]
    scores: dict[str, np.ndarray]

    def top(self, measure: str, count: int) -> list[str]:
        """The ``count`` most suspicious texts by one measure.

        Example:
          >>> RankedTexts(("a", "b"), {"zlib": np.array([0.1, 0.2])}).top("zlib", 1)
          ['b']
        """
        if measure not in self.scores:
            raise DpjaxError(f"measure {measure!r} is unknown; use one of {sorted(self.scores)}")
        order = np.argsort(-self.scores[measure], kind="stable")[:count]
        return [self.texts[n] for n in order]


def ranked_generation(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    key: RandomKey,
    *,
    num_texts: int,
    max_new_tokens: int,
    prompts: Sequence[str] = ("",),
    temperature: float = 1.0,
    top_k: int | None = 40,
    top_p: float | None = None,
    window: int = 50,
    reference: tuple[DecoderConfig, PyTree] | None = None,
    batch_size: int = 64,
) -> RankedTexts:
    """Draws texts, drops repeated ones, and scores each by every measure of `RankedTexts`.

    Args:
      config, params, tokenizer: the model under attack.
      key: JAX random key.
      num_texts: texts to draw; fewer distinct ones may remain.
      max_new_tokens: for each.
      prompts: taken in turn; "" begins with the bos token only.
      temperature, top_k, top_p: as in `dpjax.generation.generate`.
      window: tokens in the sliding window.
      reference: another model with the same tokenizer, e.g. the pretrained one.
      batch_size: texts at once.

    Source: Carlini et al. (2021), *Extracting training data from large language models*,
      sections 4 and 5.2.

    Example:
      >>> import jax
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> found = ranked_generation(config, init_params(config, jax.random.key(0)),
      ...     byte_tokenizer(), jax.random.key(1), num_texts=4, max_new_tokens=8)
      >>> sorted(found.scores), len(found.texts) <= 4
      (['lowercase', 'perplexity', 'window', 'zlib'], True)
    """
    if num_texts < 1 or not prompts or window < 1:
        raise DpjaxError(
            f"num_texts is {num_texts}, window {window}, with {len(prompts)} prompts; each must be"
            " at least 1"
        )
    starts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    drawn = generate(
        config,
        params,
        [starts[n % len(starts)] for n in range(num_texts)],
        key,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=tokenizer.eos_id,
        batch_size=batch_size,
    )
    texts = [
        prompts[n % len(prompts)] + tokenizer.decode(tokens).strip("\x00")
        for n, tokens in enumerate(drawn)
    ]
    # The same words with other space are the same find.
    distinct = list({" ".join(text.split()): text for text in reversed(texts)}.values())[::-1]
    distinct = [text for text in distinct if text.strip()]
    if not distinct:
        raise DpjaxError("every generated text is empty; raise max_new_tokens or the temperature")

    def log_probs(model: tuple[DecoderConfig, PyTree], some: list[str]) -> list[np.ndarray]:
        length = max(len(ids) for ids in tokenizer.encode_batch(list(some))) + 2
        if model[0].positions == "learned":
            length = min(length, model[0].max_positions)
        data = dataset_from_records([Record(text) for text in some], tokenizer, length)
        found = token_statistics(model[0], model[1], data, batch_size=batch_size)
        return [row[mask] for row, mask in zip(found.log_probs, found.mask, strict=True)]

    own = log_probs((config, params), distinct)
    mean = np.array([row.mean(dtype=np.float64) for row in own])
    compressed = np.array([len(zlib.compress(text.encode())) for text in distinct])
    lower = log_probs((config, params), [text.lower() for text in distinct])
    scores = {
        "perplexity": mean,
        "zlib": np.array([row.sum(dtype=np.float64) for row in own]) / compressed,
        "lowercase": mean - np.array([row.mean(dtype=np.float64) for row in lower]),
        "window": np.array([_best_window(row, window) for row in own]),
    }
    if reference is not None:
        other = log_probs(reference, distinct)
        scores["reference"] = mean - np.array([row.mean(dtype=np.float64) for row in other])
    return RankedTexts(tuple(distinct), scores)


def _best_window(row: np.ndarray, window: int) -> float:
    sums = np.concatenate([[0.0], np.cumsum(row, dtype=np.float64)])
    width = min(window, len(row))
    return float(np.max(sums[width:] - sums[:-width]) / width)


class Verification(NamedTuple):
    """What a search of the corpus says of the texts that were looked at."""

    found: dict[str, list[tuple[str, Match]]]  # measure -> texts that hold a long verbatim match
    looked_at: int  # texts for each measure
    min_length: int  # characters of a match that counts

    def precision(self) -> dict[str, float]:
        """Share of the texts looked at that hold a match, by measure.

        Example:
          >>> Verification({"zlib": [("a secret", Match(8, 0, 0, 0))]}, 4, 8).precision()
          {'zlib': 0.25}
        """
        return {name: len(texts) / self.looked_at for name, texts in self.found.items()}


def verify(
    ranked: RankedTexts,
    corpora: Mapping[str, Sequence[str]],
    *,
    count: int = 100,
    min_length: int = 50,
) -> dict[str, Verification]:
    """Searches each corpus for what the top texts by each measure hold verbatim.

    Give the training corpus beside one of the same kind that was not trained on: phrases that are
    common to both are no leak.

    Args:
      corpora: name -> documents, e.g. {"training": ..., "held out": ...}.
      count: top texts of each measure that are looked at.
      min_length: characters in a row that make a match.

    Returns:
      One `Verification` for each corpus.

    Example:
      >>> ranked = RankedTexts(("the code is 93411", "hello"), {"zlib": np.array([2.0, 1.0])})
      >>> found = verify(ranked, {"training": ["my code is 93411!"], "held out": ["the code"]},
      ...                count=2, min_length=10)
      >>> found["training"].precision(), found["held out"].precision()
      ({'zlib': 0.5}, {'zlib': 0.0})
    """
    if count < 1 or min_length < 1:
        raise DpjaxError(f"count is {count}, min_length {min_length}; both must be at least 1")
    looked_at = min(count, len(ranked.texts))
    results = {}
    for name, documents in corpora.items():
        index, known = SuffixIndex(documents), {}
        found: dict[str, list[tuple[str, Match]]] = {}
        for measure in ranked.scores:
            found[measure] = []
            for text in ranked.top(measure, looked_at):
                if text not in known:
                    known[text] = index.longest_match(text)
                if known[text].length >= min_length:
                    found[measure].append((text, known[text]))
        results[name] = Verification(found, looked_at, min_length)
    return results
