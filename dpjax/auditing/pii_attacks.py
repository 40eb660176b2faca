"""Personal data from a language model: extraction, reconstruction and inference.

Three attackers, each told more than the one before: one who only samples, one who knows the rest of
the sentence, and one who also has a list of candidates with the truth in it. Each is run on secrets
that were planted in training and on twins that were not; the difference is what was leaked.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpjax.auditing.rates import rate_result
from dpjax.auditing.results import AttackResult
from dpjax.auditing.scoring import token_statistics
from dpjax.data import (
    PlantedPII,
    PlantedSecret,
    Record,
    Tokenizer,
    dataset_from_records,
    plant_pii,
    recognise_pii,
)
from dpjax.errors import DpjaxError
from dpjax.generation import generate
from dpjax.models import DecoderConfig
from dpjax.quality import count_secrets
from dpjax.types import PyTree, RandomKey


def pii_extraction(
    texts: Sequence[str],
    planted: PlantedPII,
    *,
    known_values: Sequence[str] = (),
    confidence: float = 0.95,
) -> AttackResult:
    """Which planted secrets stand in texts that a model wrote.

    Args:
      texts: generated, e.g. by `dpjax.auditing.ranked_generation`.
      planted: what was planted, and the twins.
      known_values: every personal value of the training records, for the precision: what share of
        the values that `dpjax.data.recognise_pii` sees in the texts is somebody's.

    Returns:
      Rates over secrets; ``details`` has "recognised" and "recognised_true" values, distinct ones,
      and "precision" (None if nothing was recognised).

    Source: Lukas et al. (2023), *Analyzing leakage of personally identifiable information in
      language models*, section IV-B.

    Example:
      >>> planted = plant_pii([], repetitions={1: 4}, seed=0, kinds=["phone"])[1]
      >>> found = pii_extraction([planted.inserted[0].text, "call 202-555-0143"], planted)
      >>> found.metrics["rate"].value, found.details["precision"]
      (0.25, 0.5)
    """
    if not texts:
        raise DpjaxError("there are no texts; generate some first")
    _both(planted)
    hits = []
    for secrets in (planted.inserted, planted.held_out):
        found = set(count_secrets(texts, [s.secret for s in secrets]).sensitive_found)
        hits.append([secret.secret in found for secret in secrets])
    true = {_plain(s.secret) for s in planted.inserted} | {_plain(v) for v in known_values}
    recognised = {_plain(span.value) for text in texts for span in recognise_pii(text)}
    details = {
        "texts": len(texts),
        "recognised": len(recognised),
        "recognised_true": len(recognised & true),
        "precision": len(recognised & true) / len(recognised) if recognised else None,
    }
    return rate_result(
        "pii extraction",
        *hits,
        threat_view="B",
        assumptions=("the attacker samples, and can tell a secret when it is seen",),
        confidence=confidence,
        details=details,
    )


class Ranking(NamedTuple):
    """How likely a model finds each candidate in its sentence."""

    log_probs: tuple[np.ndarray, ...]  # float64[C] for each secret, nats, of the whole sentence
    ranks: np.ndarray  # int64[N], of the truth, which is candidate 0; 1 is the likeliest


def rank_candidates(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    secrets: Sequence[PlantedSecret],
    candidates: Sequence[Sequence[str]],
    *,
    reference: tuple[DecoderConfig, PyTree] | None = None,
    batch_size: int = 64,
) -> Ranking:
    """Fills every candidate into its secret's sentence, in one batched pass over all of them.

    Args:
      config, params, tokenizer: the model.
      secrets: N sentences with a gap.
      candidates: N lists; the first of each is the truth. Ties count against the attacker.
      reference: a model that saw none of it, whose log-probabilities are subtracted: what is likely
        anyway is no evidence.
      batch_size: sentences at once.

    Example:
      >>> import jax
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> secret = plant_pii([], repetitions={1: 1}, seed=0, kinds=["phone"])[1].inserted[0]
      >>> found = rank_candidates(config, init_params(config, jax.random.key(0)),
      ...     byte_tokenizer(), [secret], [[secret.secret, "202-555-0143"]])
      >>> found.log_probs[0].shape, found.ranks.shape
      ((2,), (1,))
    """
    if not secrets or len(secrets) != len(candidates):
        raise DpjaxError(
            f"there are {len(secrets)} secrets and {len(candidates)} lists of candidates; give one"
            " list for each secret"
        )
    texts, sizes = [], []
    for secret, some in zip(secrets, candidates, strict=True):
        if not some or some[0] != secret.secret:
            raise DpjaxError(
                f"candidates of {secret.secret_id} do not begin with the true value; put it first"
            )
        ending = secret.text[len(secret.prefix + secret.secret) :]
        texts += [secret.prefix + value + ending for value in some]
        sizes.append(len(some))
    length = 2 + max(len(ids) for ids in tokenizer.encode_batch(texts))
    data = dataset_from_records([Record(text) for text in texts], tokenizer, length)

    def sums(config: DecoderConfig, params: PyTree) -> np.ndarray:
        found = token_statistics(config, params, data, batch_size=batch_size)
        return np.asarray(np.where(found.mask, found.log_probs, 0.0), np.float64).sum(axis=1)

    total = sums(config, params)
    if reference is not None:
        total = total - sums(*reference)
    parts = np.split(total, np.cumsum(sizes)[:-1])
    ranks = np.array([1 + int(np.sum(part[1:] >= part[0])) for part in parts])
    return Ranking(tuple(parts), ranks)


def pii_inference(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    planted: PlantedPII,
    *,
    num_candidates: int = 100,
    seed: int,
    reference: tuple[DecoderConfig, PyTree] | None = None,
    batch_size: int = 64,
    confidence: float = 0.95,
) -> AttackResult:
    """Does the model find the true value the likeliest of candidates drawn like it?

    The other candidates are fresh values of the same kind from the generator that drew the secret,
    so that a blind guess is right with probability ``1 / num_candidates``, exactly.

    Args:
      num_candidates: |C|, the truth among them, at least 2.
      seed: of the other candidates.
      reference, batch_size: as in `rank_candidates`.

    Returns:
      Rates of rank 1; ``details`` has "blind_guess" and the "ranks" of both sides.

    Source: Lukas et al. (2023), section IV-D.

    Example:
      >>> import jax
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> planted = plant_pii([], repetitions={1: 2}, seed=0, kinds=["phone"])[1]
      >>> found = pii_inference(config, init_params(config, jax.random.key(0)), byte_tokenizer(),
      ...                       planted, num_candidates=4, seed=1)
      >>> found.details["blind_guess"], found.num_members
      (0.25, 2)
    """
    if num_candidates < 2:
        raise DpjaxError(f"num_candidates is {num_candidates}; it must be at least 2")
    _both(planted)
    both = planted.inserted + planted.held_out
    candidates = [
        [secret.secret, *values]
        for secret, values in zip(both, _others(both, num_candidates - 1, seed), strict=True)
    ]
    found = rank_candidates(
        config, params, tokenizer, both, candidates, reference=reference, batch_size=batch_size
    )
    inside, outside = np.split(found.ranks, [len(planted.inserted)])
    return rate_result(
        "pii inference",
        inside == 1,
        outside == 1,
        threat_view="B",
        assumptions=(
            "the attacker knows the rest of the sentence and a list with the true value in it",
        ),
        confidence=confidence,
        details={
            "blind_guess": 1 / num_candidates,
            "ranks": inside.tolist(),
            "ranks_of_twins": outside.tolist(),
        },
    )


def pii_reconstruction(
    config: DecoderConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    planted: PlantedPII,
    key: RandomKey,
    *,
    num_samples: int = 64,
    top_k: int | None = 40,
    temperature: float = 1.0,
    batch_size: int = 64,
    confidence: float = 0.95,
) -> AttackResult:
    """Fills the gap in a sentence with no list given: candidates are the model's own samples.

    Each sample continues the sentence up to the gap and ends where what follows the gap begins.
    The candidate that makes the whole sentence likeliest is the answer.

    Args:
      key: JAX random key.
      num_samples: candidates drawn for each secret, repeated ones counted once.
      top_k, temperature: of the samples.
      batch_size: texts at once.

    Returns:
      Rates of exact answers; ``details`` has "among_samples": how often the truth was drawn at all.

    Source: Lukas et al. (2023), section IV-C; the sentence's own likelihood is its score.

    Example:
      >>> import jax
      >>> from dpjax.data import byte_tokenizer
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", byte_tokenizer().vocabulary_size)
      >>> planted = plant_pii([], repetitions={1: 2}, seed=0, kinds=["phone"])[1]
      >>> found = pii_reconstruction(config, init_params(config, jax.random.key(0)),
      ...     byte_tokenizer(), planted, jax.random.key(1), num_samples=2)
      >>> found.metrics["rate"].value  # an untrained model knows nothing
      0.0
    """
    if num_samples < 1 or temperature <= 0:
        raise DpjaxError(
            f"num_samples is {num_samples} at temperature {temperature:g}; use at least 1, above 0"
        )
    _both(planted)
    both = planted.inserted + planted.held_out
    longest = max(len(tokenizer.encode(s.text[len(s.prefix) :])) for s in both) + 4
    drawn = generate(
        config,
        params,
        [[tokenizer.bos_id, *tokenizer.encode(s.prefix)] for s in both for _ in range(num_samples)],
        key,
        max_new_tokens=longest,
        temperature=temperature,
        top_k=top_k,
        stop_token=tokenizer.eos_id,
        batch_size=batch_size,
    )
    pools = []
    for number, secret in enumerate(both):
        ending = secret.text[len(secret.prefix + secret.secret) :]
        values = []
        for tokens in drawn[number * num_samples : (number + 1) * num_samples]:
            said = tokenizer.decode(tokens)
            cut = said.find(ending) if ending else len(said)
            if cut > 0:
                values.append(said[:cut])
        pools.append(list(dict.fromkeys(values)))
    # `rank_candidates` wants the truth first; an answer is right only if it was drawn as well.
    ranked = rank_candidates(
        config,
        params,
        tokenizer,
        both,
        [[s.secret, *(v for v in p if v != s.secret)] for s, p in zip(both, pools, strict=True)],
        batch_size=batch_size,
    )
    was_drawn = np.array([s.secret in pool for s, pool in zip(both, pools, strict=True)])
    inside, outside = np.split(was_drawn & (ranked.ranks == 1), [len(planted.inserted)])
    return rate_result(
        "pii reconstruction",
        inside,
        outside,
        threat_view="B",
        assumptions=("the attacker knows the rest of the sentence",),
        confidence=confidence,
        details={
            "among_samples": float(was_drawn[: len(planted.inserted)].mean()),
            "among_samples_of_twins": float(was_drawn[len(planted.inserted) :].mean()),
        },
    )


def _both(planted: PlantedPII) -> None:
    if not planted.inserted or not planted.held_out:
        raise DpjaxError(
            f"{len(planted.inserted)} secrets and {len(planted.held_out)} twins were given; the"
            " rate on twins is what the rate on secrets is compared with: plant both"
        )


def _others(secrets: Sequence[PlantedSecret], count: int, seed: int) -> list[list[str]]:
    """``count`` fresh values for each secret, of its kind and locale, none of them a secret."""
    taken = {secret.secret for secret in secrets}
    pools: dict[tuple[str, str], list[str]] = {}
    for kind in sorted({(s.locale, s.kind) for s in secrets}):
        wanted = count + len(secrets)
        drawn = plant_pii(
            [], repetitions={1: wanted}, seed=seed, locales=[kind[0]], kinds=[kind[1]],
            num_held_out_twins=0,
        )[1]  # fmt: skip
        pools[kind] = [s.secret for s in drawn.inserted if s.secret not in taken]
    rng, found = np.random.default_rng(seed), []
    for secret in secrets:
        pool = pools[secret.locale, secret.kind]
        found.append([pool[i] for i in rng.permutation(len(pool))[:count]])
    return found


def _plain(value: str) -> str:
    return "".join(c for c in value.lower() if c.isalnum())
