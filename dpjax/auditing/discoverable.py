"""Discoverable extraction: does a model, given how a training text begins, say how it goes on?

An extraction counts only beside the same attack on twins that the model never saw:
`dpjax.auditing.rate_result` subtracts their rate.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpjax.auditing.rates import rate_result
from dpjax.auditing.results import AttackResult
from dpjax.auditing.scoring import map_examples
from dpjax.data import ArrayDataset, Dataset
from dpjax.errors import DpjaxError
from dpjax.generation import generate, truncated_logits
from dpjax.models import DecoderConfig, apply
from dpjax.types import PyTree, RandomKey

Tokens = Sequence[int] | np.ndarray


class Extraction(NamedTuple):
    """What came out for N sequences."""

    is_exact: np.ndarray  # bool[N], some sample equals the suffix token for token
    share_equal: np.ndarray  # float64[N], of suffix tokens right in their place, best sample
    exact_samples: np.ndarray  # int64[N], how many of the samples are exact


def discoverable(
    config: DecoderConfig,
    params: PyTree,
    prefixes: Sequence[Tokens],
    suffixes: Sequence[Tokens],
    key: RandomKey | None = None,
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 64,
) -> Extraction:
    """Prompts with each prefix and compares what is generated with the suffix.

    Args:
      config, params: the model.
      prefixes, suffixes: N pairs of token sequences, each non-empty; lengths may differ. Give the
        prefix its bos token where training had one.
      key: JAX random key; None only with temperature 0.
      num_samples: texts drawn for each prefix; 1 with temperature 0, which draws nothing.
      temperature, top_k, top_p: how tokens are drawn, as in `dpjax.generation.generate`.
      batch_size: texts at once.

    Raises:
      DpjaxError: no pairs, an empty prefix or suffix, or several samples without randomness.

    Source: Carlini et al. (2023), *Quantifying memorization across neural language models*,
      definition 3.1; sampled: Hayes et al. (2024), section 3.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> said = generate(config, params, [[1, 2]], None, max_new_tokens=3, temperature=0.0)
      >>> discoverable(config, params, [[1, 2]], said).is_exact.tolist()
      [True]
    """
    prefixes, suffixes = _checked(prefixes, suffixes)
    if num_samples < 1 or (temperature == 0.0 and num_samples > 1):
        raise DpjaxError(
            f"num_samples is {num_samples} at temperature {temperature:g}; use 1, or a temperature"
            " above 0 and at least 1 sample"
        )
    drawn = generate(
        config,
        params,
        [prefix for prefix in prefixes for _ in range(num_samples)],
        key,
        max_new_tokens=max(map(len, suffixes)),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        batch_size=batch_size,
    )
    shares = np.array(
        [
            float(np.mean(np.asarray(text[: len(suffix)]) == np.asarray(suffix)))
            for text, suffix in zip(
                drawn, (s for s in suffixes for _ in range(num_samples)), strict=True
            )
        ]
    ).reshape(len(prefixes), num_samples)
    exact = np.sum(shares == 1.0, axis=1)
    return Extraction(exact > 0, shares.max(axis=1), exact)


def suffix_log_probabilities(
    config: DecoderConfig,
    params: PyTree,
    prefixes: Sequence[Tokens],
    suffixes: Sequence[Tokens],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Log-probability that one sample from each prefix is exactly the suffix: float64[N], nats.

    It is that of the very sampling scheme: temperature, cuts and renormalisation included; minus
    infinity where the scheme cuts a token of the suffix. One forward pass for each sequence, no
    sampling.

    Args:
      prefixes, suffixes: N pairs of token sequences, each non-empty; lengths may differ.
      temperature, top_k, top_p: as in `dpjax.generation.generate`.
      batch_size: sequences at once, sharded over the devices.

    Source: Hayes et al. (2024), *Measuring memorization in language models via probabilistic
      extraction*, section 3.2.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> found = suffix_log_probabilities(config, params, [[1], [1]], [[5], [5, 6]])
      >>> bool(found[1] < found[0] < 0)
      True
    """
    prefixes, suffixes = _checked(prefixes, suffixes)
    whole = [[*p, *s] for p, s in zip(prefixes, suffixes, strict=True)]
    outside = [t for tokens in whole for t in tokens if not 0 <= t < config.vocabulary_size]
    if outside:
        raise DpjaxError(
            f"token {outside[0]} is outside the vocabulary of {config.vocabulary_size}; encode with"
            " the model's own tokenizer"
        )
    if temperature < 0:
        raise DpjaxError(f"temperature is {temperature}; it must be at least 0 (0 is greedy)")
    width = -(-max(map(len, whole)) // 16) * 16
    if config.positions == "learned":
        width = min(width, config.max_positions + 1)
        if max(map(len, whole)) > width:
            raise DpjaxError(
                f"a sequence has {max(map(len, whole))} tokens; the model has"
                f" {config.max_positions} positions; shorten it"
            )
    tokens = np.zeros((len(whole), width), np.int32)
    mask = np.zeros((len(whole), width), bool)
    for row, (prefix, text) in enumerate(zip(prefixes, whole, strict=True)):
        tokens[row, : len(text)] = text
        mask[row, len(prefix) : len(text)] = True
    data = ArrayDataset({"tokens": tokens, "suffix_mask": mask})
    scorer = _scorer(config, temperature, top_k, top_p)
    return map_examples(scorer, (params,), data, batch_size)[0].astype(np.float64)


@functools.lru_cache(maxsize=16)
def _scorer(
    config: DecoderConfig, temperature: float, top_k: int | None, top_p: float | None
) -> Callable:
    def one(params, tokens, mask):
        logits = apply(config, params, tokens[:-1]).astype(jnp.float32)
        scheme = functools.partial(
            truncated_logits, temperature=temperature, top_k=top_k, top_p=top_p
        )
        log_probs = jax.nn.log_softmax(jax.vmap(scheme)(logits))
        chosen = jnp.take_along_axis(log_probs, tokens[1:, None], axis=1)[:, 0]
        # Not a product with the mask: minus infinity times zero would be NaN.
        return jnp.sum(jnp.where(mask[1:], chosen, 0.0))

    def batched(params, batch):
        return (jax.vmap(one, (None, 0, 0))(params, batch["tokens"], batch["suffix_mask"]),)

    return jax.jit(batched)


def extraction_probability(log_probabilities: np.ndarray | float, num_queries: float) -> np.ndarray:
    """Probability that at least one of n samples is the suffix: ``1 - (1 - p)^n``.

    Args:
      log_probabilities: float[...], nats, at most 0; of one sample each.
      num_queries: n >= 1.

    Example:
      >>> print(f"{extraction_probability(np.log(0.5), 3):.3f}")
      0.875
      >>> print(f"{extraction_probability(-60.0, 1e9):.3e}")  # 1 - p rounds to 1 here
      8.757e-18
    """
    logs = _log_probabilities(log_probabilities)
    if not num_queries >= 1:
        raise DpjaxError(f"num_queries is {num_queries}; it must be at least 1")
    return -np.expm1(-num_queries * np.exp(_log_hazard(logs)))


def queries_needed(log_probabilities: np.ndarray | float, success_probability: float) -> np.ndarray:
    """The least n with `extraction_probability` at least this: float64[...], inf if never.

    A float, because the numbers pass 2^63 for texts that are safe.

    Args:
      log_probabilities: float[...], nats, at most 0; of one sample each.
      success_probability: in (0, 1).

    Source: Hayes et al. (2024), equation 2.

    Example:
      >>> queries_needed(np.log([1.0, 0.5, 0.001]), 0.875).tolist()
      [1.0, 3.0, 2079.0]
      >>> queries_needed(-np.inf, 0.5).item()
      inf
    """
    logs = _log_probabilities(log_probabilities)
    if not 0 < success_probability < 1:
        raise DpjaxError(
            f"success_probability is {success_probability}; it must be between 0 and 1"
        )
    wanted = -math.log1p(-success_probability)
    with np.errstate(over="ignore"):
        # A hair below, because 1 - (1 - 1/2)^3 = 7/8 must not become 4 by rounding.
        exact = np.exp(np.log(wanted) - _log_hazard(logs))
    return np.maximum(1.0, np.ceil(exact * (1 - 1e-12)))


def extraction_attacks(
    config: DecoderConfig,
    params: PyTree,
    members: Dataset,
    non_members: Dataset,
    *,
    suffix_length: int = 16,
    num_queries: Sequence[int] = (1, 100, 10_000),
    success_probability: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 64,
) -> list[AttackResult]:
    """(n, p)-discoverable extraction of records' ends, from the probabilities themselves.

    A record is extracted with n queries if one of n samples, prompted with the record up to its
    last ``suffix_length`` tokens, is exactly those tokens with at least the stated probability.

    Args:
      config, params: the model.
      members, non_members: rows of the same kind, trained on and not.
      suffix_length: tokens that must come out; a record needs more than these.
      num_queries: n, one result for each.
      success_probability: p.
      temperature, top_k, top_p: of the sampling that the attacker is given.
      batch_size: rows at once.

    Raises:
      DpjaxError: no record on one of the sides is long enough.

    Source: Hayes et al. (2024), definition 3.2.

    Example:
      >>> from dpjax.data import Record, byte_tokenizer, dataset_from_records
      >>> from dpjax.models import decoder_config, init_params
      >>> rows = dataset_from_records([Record("a longer record")], byte_tokenizer(), 16)
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> found = extraction_attacks(
      ...     config, init_params(config, jax.random.key(0)), rows, rows, suffix_length=8)
      >>> found[0].attack, found[0].metrics["extra_rate"].value
      ('extraction in 1 query', 0.0)
    """
    if suffix_length < 1:
        raise DpjaxError(f"suffix_length is {suffix_length}; it must be at least 1")
    logs, left_out = [], 0
    for name, rows in (("members", members), ("non-members", non_members)):
        pairs = []
        for tokens, mask in zip(rows.tokens, rows.loss_mask, strict=True):
            # Up to the last predicted token; what stands before is the prompt, control code or not.
            end = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
            if end > suffix_length and mask[end - suffix_length : end].all():
                pairs.append((tokens[: end - suffix_length], tokens[end - suffix_length : end]))
        if not pairs:
            raise DpjaxError(
                f"none of the {len(rows)} {name} has more than {suffix_length} tokens; use a"
                " shorter suffix_length"
            )
        left_out += len(rows) - len(pairs)
        prefixes, suffixes = zip(*pairs, strict=True)
        logs.append(
            suffix_log_probabilities(
                config,
                params,
                prefixes,
                suffixes,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                batch_size=batch_size,
            )
        )
    notes = [
        f"the attacker knows each record up to its last {suffix_length} tokens",
        f"extracted: with probability {success_probability:g} or more",
    ]
    if left_out:
        notes.append(f"{left_out} shorter records were left out")
    results = []
    for count in num_queries:
        hits = [queries_needed(log, success_probability) <= count for log in logs]
        label = f"extraction in {count:,} quer{'y' if count == 1 else 'ies'}"
        results.append(rate_result(label, *hits, threat_view="B", assumptions=notes))
    return results


def _log_hazard(logs: np.ndarray) -> np.ndarray:
    """log(-log(1 - p)): each query's share in the exponent; for small p it is log p."""
    with np.errstate(divide="ignore"):
        large = np.log(-np.log1p(-np.exp(np.maximum(logs, -30.0))))
    return np.where(logs < -30.0, logs, large)


def _log_probabilities(values: np.ndarray | float) -> np.ndarray:
    logs = np.asarray(values, np.float64)
    # A forward pass in float32 may leave a certain text a hair above 0.
    if np.any(np.isnan(logs)) or np.any(logs > 1e-4):
        bad = logs[np.isnan(logs) | (logs > 1e-4)].flat[0]
        raise DpjaxError(f"a log-probability is {bad}; it must be at most 0, in nats")
    return np.minimum(logs, 0.0)


def _checked(
    prefixes: Sequence[Tokens], suffixes: Sequence[Tokens]
) -> tuple[list[list[int]], list[list[int]]]:
    if len(prefixes) != len(suffixes) or not len(prefixes):
        raise DpjaxError(
            f"there are {len(prefixes)} prefixes and {len(suffixes)} suffixes; give pairs, at"
            " least one"
        )
    found = [[int(t) for t in p] for p in prefixes], [[int(t) for t in s] for s in suffixes]
    for name, part in zip(("prefix", "suffix"), found, strict=True):
        for row, tokens in enumerate(part):
            if not tokens:
                raise DpjaxError(f"{name} {row} is empty; give it at least one token")
    return found
