"""Synthetic text from private records at inference time: each token a private draw, no training.

Records are divided into disjoint batches, one per synthetic text. At each token every record of the
batch, in its own prompt, gives logits; how far they move the logits of a public prompt without any
record is clipped and averaged, and the token is drawn from the result's softmax. That draw is an
exponential mechanism, and the only place where text depends on records.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpjax import accounting
from dpjax.data import Tokenizer
from dpjax.errors import DpjaxError
from dpjax.models import Cache, DecoderConfig, apply_cached, init_caches
from dpjax.types import NeighboringRelation, PyTree, RandomKey, require_key

PRIVATE_TEMPLATE = "Here is a text:\n{record}\nHere is another of the same kind:\n"
PUBLIC_PROMPT = "Here is a text:\n"
_PLACE = "{record}"


@dataclasses.dataclass(frozen=True)
class PrivatePrediction:
    """The private draw of tokens and what it costs.

    Give exactly one of ``logit_clip`` and (``target_epsilon``, ``target_delta``); from a target the
    clip is calibrated once, here.

    Attributes:
      batch_size: records expected in a batch, B: the PUBLIC constant that divides the sum. Choose
        it without counting the records.
      max_new_tokens: tokens drawn for a text, T; a text that ends earlier has still paid for all.
      temperature: above 0; divides the aggregated logits.
      logit_clip: nats, C: how far one record may move any logit, before the division by B.
      target_epsilon: nats, of all texts together.
      target_delta: in (0, 1), well below 1 / number of records.
      public_top_k: draw only among the k likeliest tokens of the PUBLIC prompt; ties stay.

    Raises:
      DpjaxError: contradictory or impossible settings.

    Guarantee:
      - The aggregated logits phi_pub + (1/B) sum_i clip(phi_i - phi_pub, -C, C) move by at most C/B
        anywhere when one record is added, removed or zeroed out (its prompt made the public one).
      - So the log ratio of a token's probabilities on two neighbours has a range of at most
        eta = 2 C / (B temperature), and a draw is eta^2 / 8 = (C / (B temperature))^2 / 2 - zCDP:
        with Z = log(P/Q) under Q, K(t) = log E exp(t Z) has K(0) = K(1) = 0 and K'' <= eta^2 / 4
        (variance of a variable with range eta), hence K(a) <= a (a - 1) eta^2 / 8 for a > 1.
      - zCDP adds up over the ``max_new_tokens`` adaptive draws of a text. A record is in one batch,
        so any number of texts costs what one costs: pass each record once.
      - ``epsilon`` is for add-or-remove-one record; a person with m records pays for a group of m.
      - Real arithmetic is assumed. In float32, rounding moves logits by parts in a million.

    Source: Vinod et al. (2025), InvisibleInk, for difference clipping (their utils.compute_rho has
    the same rho); Amin et al. (2024) for disjoint batches; Cesar and Rogers (2021) and Dong et al.
    (2020) for bounded range; Bun and Steinke (2016) for zCDP.

    Example:
      >>> mechanism = PrivatePrediction(batch_size=100, max_new_tokens=200, logit_clip=5.0)
      >>> f"{mechanism.zcdp_per_token:.5f} {mechanism.epsilon(1e-6):.2f}"
      '0.00125 3.54'
      >>> calibrated = PrivatePrediction(100, 200, target_epsilon=3.54, target_delta=1e-6)
      >>> f"{calibrated.logit_clip:.2f}"
      '5.00'
    """

    batch_size: int
    max_new_tokens: int
    temperature: float = 1.0
    logit_clip: float | None = None
    target_epsilon: float | None = None
    target_delta: float | None = None
    public_top_k: int | None = None

    def __post_init__(self):
        for name in ("batch_size", "max_new_tokens", "public_top_k"):
            value = getattr(self, name)
            is_count = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not (is_count and value >= 1) and not (name == "public_top_k" and value is None):
                raise DpjaxError(f"{name} is {value}; it must be an integer of at least 1")
        if not 0 < self.temperature < math.inf:
            raise DpjaxError(
                f"temperature is {self.temperature}; the random draw is what protects the records, "
                "so it must be positive and finite, e.g. 1.0"
            )
        targets = (self.target_epsilon, self.target_delta)
        by_target = targets != (None, None)
        if (self.logit_clip is None) != by_target or (by_target and None in targets):
            raise DpjaxError(
                f"logit_clip is {self.logit_clip}, target_epsilon is {self.target_epsilon}, "
                f"target_delta is {self.target_delta}; give either logit_clip or both targets"
            )
        if self.target_epsilon is not None and self.target_delta is not None:
            noise_multiplier = accounting.calibrate_noise_multiplier(
                self._event, self.target_epsilon, self.target_delta
            )
            logit_clip = self.batch_size * self.temperature / noise_multiplier
            object.__setattr__(self, "logit_clip", logit_clip)
        if not 0 < self._clip < math.inf:
            raise DpjaxError(
                f"logit_clip is {self.logit_clip}; it must be positive and finite, e.g. 1.0"
            )

    @property
    def _clip(self) -> float:
        assert self.logit_clip is not None
        return self.logit_clip

    def _event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        token = dp_accounting.ZCDpEvent(0.5 / noise_multiplier**2)
        return dp_accounting.SelfComposedDpEvent(token, self.max_new_tokens)

    @property
    def sensitivity(self) -> float:
        """Nats by which one record can move an aggregated logit, before the temperature."""
        return self._clip / self.batch_size

    @property
    def noise_multiplier(self) -> float:
        """Of the Gaussian that costs what a draw does: temperature / sensitivity."""
        return self.temperature / self.sensitivity

    @property
    def zcdp_per_token(self) -> float:
        """rho of one draw."""
        return 0.5 / self.noise_multiplier**2

    @property
    def dp_event(self) -> dp_accounting.DpEvent:
        """dp_accounting event of one call of `predict_texts`, whatever the number of texts."""
        return self._event(self.noise_multiplier)

    @property
    def neighboring_relation(self) -> NeighboringRelation:
        """Add or remove one record."""
        return NeighboringRelation.ADD_OR_REMOVE_ONE

    def epsilon(self, delta: float, accountant: accounting.Accountant = "rdp") -> float:
        """Epsilon of one call of `predict_texts` at ``delta``, in nats."""
        if accountant != "rdp":
            raise DpjaxError(
                f"accountant is {accountant!r}; a token's cost is known as zCDP, which only 'rdp' "
                "composes: use 'rdp'"
            )
        return accounting.epsilon(self.dp_event, delta, "rdp", self.neighboring_relation)


def assign_batches(
    records: Sequence[str] | Sequence[int] | np.ndarray, num_batches: int, seed: int
) -> np.ndarray:
    """The batch of each record, by a keyed hash of that record alone.

    Args:
      records: ids (integers) or texts (strings); what identifies a record.
      num_batches: public, the number of synthetic texts.
      seed: any integer chosen without looking at the records; it may be public.

    Returns:
      int64[N] in ``[0, num_batches)``.

    Raises:
      DpjaxError: no batch, or a record that is neither a string nor an integer.

    Guarantee:
      - Adding or removing a record moves no other one, so batches differ in at most that record.
      - Batch sizes are random, about N / num_batches, and private; a batch may be empty.
      - Equal records share a batch. Copies of one text are so many records to the guarantee: m of
        them may move a logit by m C/B. Remove duplicates first, or count them as a group.

    Example:
      >>> assign_batches(["ann", "bob", "cy", "ann"], 3, seed=1).tolist()
      [2, 1, 1, 2]
      >>> assign_batches(["ann", "cy", "ann"], 3, seed=1).tolist()
      [2, 1, 2]
    """
    if num_batches < 1:
        raise DpjaxError(f"num_batches is {num_batches}; it must be at least 1, one per text")
    key = hashlib.blake2b(f"dpjax private prediction {int(seed)}".encode()).digest()

    def batch(record: str | int) -> int:
        if isinstance(record, str):
            name = b"text " + record.encode("utf-8", "surrogatepass")
        elif isinstance(record, (int, np.integer)):
            name = b"id %d" % int(record)
        else:
            raise DpjaxError(
                f"a record is a {type(record).__name__}; pass texts (str) or ids (int)"
            )
        digest = hashlib.blake2b(name, key=key, digest_size=16).digest()
        return int.from_bytes(digest, "little") % num_batches

    return np.array([batch(record) for record in records], np.int64)


def prompt_private(
    tokenizer: Tokenizer, record: str, max_record_tokens: int, template: str = PRIVATE_TEMPLATE
) -> list[int]:
    """Token ids of a prompt that shows one record, cut to ``max_record_tokens`` tokens.

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> prompt = prompt_private(byte_tokenizer(), "abcd", 2, "Like {record}:")
      >>> byte_tokenizer().decode(prompt), prompt[0] == byte_tokenizer().bos_id
      ('Like ab:', True)
    """
    before, after = _around(tokenizer, max_record_tokens, template)
    return [*before, *tokenizer.encode(record)[:max_record_tokens], *after]


def prompt_public(tokenizer: Tokenizer, prompt: str = PUBLIC_PROMPT) -> list[int]:
    """Token ids of the prompt without a record.

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> byte_tokenizer().decode(prompt_public(byte_tokenizer()))
      'Here is a text:\\n'
    """
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def longest_prompt(
    tokenizer: Tokenizer, max_record_tokens: int, template: str = PRIVATE_TEMPLATE
) -> int:
    """Tokens that no private prompt exceeds, from public settings alone.

    Example:
      >>> from dpjax.data import byte_tokenizer
      >>> longest_prompt(byte_tokenizer(), 2, "Like {record}:")
      9
    """
    before, after = _around(tokenizer, max_record_tokens, template)
    return len(before) + max_record_tokens + len(after)


def _around(tokenizer, max_record_tokens: int, template: str) -> tuple[list[int], list[int]]:
    """What stands before and after the record."""
    if template.count(_PLACE) != 1:
        raise DpjaxError(f"the template is {template!r}; it must hold {_PLACE} exactly once")
    if max_record_tokens < 1:
        raise DpjaxError(f"max_record_tokens is {max_record_tokens}; it must be at least 1")
    before, after = template.split(_PLACE)
    return [tokenizer.bos_id, *tokenizer.encode(before)], tokenizer.encode(after)


def sum_of_clipped_differences(
    private_logits: Float[Array, "contexts vocabulary"],
    public_logits: Float[Array, " vocabulary"],
    is_padding_example: Bool[Array, " contexts"],
    logit_clip: float,
) -> Float[Array, " vocabulary"]:
    """Sum over records of clip(phi_i - phi_pub, -C, C), in float32.

    Guarantee:
      Padding adds exactly 0; so does a record with any NaN or infinite logit, as if it were
      removed. Tokens that the public logits exclude (-inf) get 0 and are not looked at.

    Example:
      >>> private = jnp.array([[0.0, 9.0], [0.5, jnp.nan], [7.0, 7.0]])
      >>> print(sum_of_clipped_differences(
      ...     private, jnp.array([0.0, 1.0]), jnp.array([False, False, True]), 2.0))
      [0. 2.]
    """
    public = public_logits.astype(jnp.float32)[None, :]
    differences = private_logits.astype(jnp.float32) - public
    differences = jnp.where(jnp.isfinite(public), differences, 0.0)
    counts = ~is_padding_example & jnp.all(jnp.isfinite(differences), axis=1)
    clipped = jnp.clip(differences, -logit_clip, logit_clip)
    return jnp.sum(jnp.where(counts[:, None], clipped, 0.0), axis=0)


def token_logits(
    mechanism: PrivatePrediction,
    public_logits: Float[Array, " vocabulary"],
    sum_of_differences: Float[Array, " vocabulary"],
) -> Float[Array, " vocabulary"]:
    """Logits whose softmax the token is drawn from: aggregated, over the temperature, cut.

    Example:
      >>> mechanism = PrivatePrediction(4, 1, temperature=0.5, logit_clip=1.0, public_top_k=2)
      >>> print(token_logits(mechanism, jnp.array([0.0, 1.0, 2.0]), jnp.array([4.0, 2.0, 0.0])))
      [-inf   3.   4.]
    """
    public = public_logits.astype(jnp.float32)
    scaled = (public + sum_of_differences / mechanism.batch_size) / mechanism.temperature
    if mechanism.public_top_k is not None:
        kept = min(mechanism.public_top_k, public.shape[0])
        scaled = jnp.where(public < jax.lax.top_k(public, kept)[0][-1], -jnp.inf, scaled)
    return scaled


class _Contexts(NamedTuple):
    """The prompts of one text, in chunks of a public shape."""

    public_prompt: Int[np.ndarray, " width"]
    public_length: Int[np.ndarray, ""] | np.int32
    prompts: Int[np.ndarray, "chunks microbatch width"]
    lengths: Int[np.ndarray, "chunks microbatch"]
    is_padding_example: Bool[np.ndarray, "chunks microbatch"]
    num_chunks: np.int32  # chunks with a record; those behind are not computed


class _Writing(NamedTuple):
    """Where a text stands."""

    tokens: Int[Array, " max_new_tokens"]
    drawn: Int[Array, ""]
    logits: Float[Array, " vocabulary"]  # that the next token is drawn from
    caches: tuple[Sequence[Cache], Sequence[Cache]]  # public; private [chunks, microbatch, ...]
    is_finite: Bool[Array, ""]  # the public logits of all tokens so far
    is_done: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "mechanism", "stop_tokens"))
def _write(config, params, contexts, key, *, mechanism, stop_tokens) -> _Writing:
    """One whole text, from `_Contexts`."""
    chunks, microbatch, width = contexts.prompts.shape
    feed = functools.partial(apply_cached, config, params)

    def advance(caches, public_fed, private_fed):
        # Reads on in every context. Fed: tokens, the number of earlier ones, whose logits to take.
        tokens, start, read = public_fed
        public, public_cache = feed(tokens, caches[0], start, read)

        def chunk(index, carry):
            private, total = carry
            mine, fed = jax.tree.map(lambda x: x[index], (private, private_fed))
            logits, mine = jax.vmap(feed)(fed[0], mine, *fed[1:])
            total += sum_of_clipped_differences(
                logits, public, contexts.is_padding_example[index], mechanism.logit_clip
            )
            return jax.tree.map(lambda x, new: x.at[index].set(new), private, mine), total

        carry = caches[1], jnp.zeros(public.shape, jnp.float32)
        private, total = jax.lax.fori_loop(0, contexts.num_chunks, chunk, carry)
        is_finite = jnp.all(public < jnp.inf) & jnp.any(public > -jnp.inf)
        return token_logits(mechanism, public, total), (public_cache, private), is_finite

    zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros((chunks, microbatch), jnp.int32)

    def body(state: _Writing) -> _Writing:
        drawn_with = jax.random.fold_in(key, state.drawn)
        # 64 random bits per token: the default's largest Gumbel value, 16, would cut the tail.
        token = jax.random.categorical(drawn_with, state.logits, mode="highest").astype(jnp.int32)
        everywhere = jnp.broadcast_to(token, (chunks, microbatch, 1))
        logits, caches, is_finite = advance(
            state.caches,
            (token[None], contexts.public_length + state.drawn, zero),
            (everywhere, contexts.lengths + state.drawn, zeros),
        )
        tokens, drawn = state.tokens.at[state.drawn].set(token), state.drawn + 1
        is_stop = jnp.any(token == jnp.asarray(stop_tokens, jnp.int32))
        is_done = is_stop | (drawn == mechanism.max_new_tokens)
        is_finite = state.is_finite & (is_finite | is_done)
        return _Writing(tokens, drawn, logits, caches, is_finite, is_done)

    empty = init_caches(config, width + mechanism.max_new_tokens)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (chunks, microbatch, *x.shape)), empty)
    logits, caches, is_finite = advance(
        (empty, many),
        (contexts.public_prompt, zero, contexts.public_length - 1),
        (contexts.prompts, zeros, contexts.lengths - 1),
    )
    tokens = jnp.zeros(mechanism.max_new_tokens, jnp.int32)
    state = _Writing(tokens, zero, logits, caches, is_finite, zero > 0)
    return jax.lax.while_loop(lambda s: ~s.is_done, body, state)._replace(caches=((), ()))


def predict_texts(
    config: DecoderConfig,
    params: PyTree,
    mechanism: PrivatePrediction,
    private_prompts: Sequence[Sequence[Sequence[int]]],
    public_prompts: Sequence[Sequence[int]],
    key: RandomKey,
    *,
    max_prompt_tokens: int,
    stop_token: int | Sequence[int] | None = None,
    microbatch_size: int = 8,
) -> list[list[int]]:
    """One private synthetic text per batch of records.

    Args:
      config, params: a model; what it has seen itself is not covered.
      mechanism: how tokens are drawn; states epsilon.
      private_prompts: for each text the prompts (token ids) of its batch, one per record, maybe
        none; see `assign_batches` and `prompt_private`.
      public_prompts: for each text the prompt without a record; see `prompt_public`.
      key: JAX random key, secret and used once: who knows it can undo the draw.
      max_prompt_tokens: public bound on the length of every prompt; see `longest_prompt`.
      stop_token: one or several; a text ends before the first, e.g. ``eos_id``.
      microbatch_size: contexts computed at once; public.

    Returns:
      The new tokens of each text.

    Raises:
      DpjaxError: prompts that do not fit each other, the model or the bound; no key; public logits
        that are not finite.

    Guarantee:
      - ``mechanism.dp_event`` covers all texts together if no record is in two batches.
      - The sum is divided by ``mechanism.batch_size``, never by the number of prompts.
      - An empty batch gives the public prompt's distribution, and so does a batch whose records all
        have logits that are not finite.
      - Contexts are computed ``microbatch_size`` at a time in one shape, so that the number of
        records does not change the rounding of another record's logits.
      - Every text and token has its own part of the key. The same key gives the same texts.
      - Only the texts are covered: not the running time, and not this call's error messages.

    Source: Vinod et al. (2025); Amin et al. (2024) for disjoint batches.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> mechanism = PrivatePrediction(batch_size=2, max_new_tokens=3, logit_clip=1.0)
      >>> batches = [[[1, 2, 3], [4, 5]], []]
      >>> texts = predict_texts(
      ...     config, params, mechanism, batches, [[1], [2]], jax.random.key(1),
      ...     max_prompt_tokens=4)
      >>> [len(tokens) for tokens in texts]
      [3, 3]
    """
    key = require_key(key)
    stops = () if stop_token is None else stop_token
    stops = (int(stops),) if isinstance(stops, int) else tuple(map(int, stops))
    if microbatch_size < 1:
        raise DpjaxError(f"microbatch_size is {microbatch_size}; it must be at least 1")
    _check_prompts(config, mechanism, private_prompts, public_prompts, max_prompt_tokens)
    largest = max(map(len, private_prompts), default=0)
    shape = (max(1, -(-largest // microbatch_size)), microbatch_size)
    texts: list[list[int]] = []
    for index, (records, public) in enumerate(zip(private_prompts, public_prompts, strict=True)):
        contexts = _contexts(records, public, shape, max_prompt_tokens)
        text_key = jax.random.fold_in(key, index)
        end = _write(config, params, contexts, text_key, mechanism=mechanism, stop_tokens=stops)
        if not bool(end.is_finite):
            raise DpjaxError(
                f"the public logits of text {index} are not finite; the draw needs them: check the "
                "model's parameters"
            )
        text = np.asarray(end.tokens)[: int(end.drawn)].tolist()
        texts.append(text[:-1] if text[-1] in stops else text)
    return texts


def _contexts(records, public, shape: tuple[int, int], width: int) -> _Contexts:
    rows = shape[0] * shape[1]
    prompts, lengths = np.zeros((1 + rows, width), np.int32), np.ones(1 + rows, np.int32)
    for row, prompt in enumerate([public, *records]):
        prompts[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return _Contexts(
        prompts[0],
        lengths[0],
        prompts[1:].reshape(*shape, width),
        lengths[1:].reshape(shape),
        (np.arange(rows) >= len(records)).reshape(shape),
        np.int32(-(-len(records) // shape[1])),
    )


def _check_prompts(config, mechanism, private_prompts, public_prompts, max_prompt_tokens) -> None:
    if len(private_prompts) != len(public_prompts):
        raise DpjaxError(
            f"there are {len(private_prompts)} batches and {len(public_prompts)} public prompts; "
            "give one public prompt per batch"
        )
    whole = max_prompt_tokens + mechanism.max_new_tokens
    if config.positions == "learned" and whole > config.max_positions:
        raise DpjaxError(
            f"max_prompt_tokens {max_prompt_tokens} and {mechanism.max_new_tokens} new tokens are "
            f"beyond the model's {config.max_positions} positions; lower one of them"
        )
    for kind, batches in (("private", private_prompts), ("public", [[p] for p in public_prompts])):
        for index, prompts in enumerate(batches):
            # No content in the message: it may be shown where the records may not.
            for prompt in prompts:
                if not 1 <= len(prompt) <= max_prompt_tokens:
                    raise DpjaxError(
                        f"a {kind} prompt of text {index} has {len(prompt)} tokens, not 1 to "
                        f"max_prompt_tokens = {max_prompt_tokens}; cut records with prompt_private"
                    )
                if min(prompt) < 0 or max(prompt) >= config.vocabulary_size:
                    raise DpjaxError(
                        f"a {kind} prompt of text {index} has a token outside the vocabulary of "
                        f"{config.vocabulary_size}; encode with the model's own tokenizer"
                    )
