"""Text from a model: jitted sampling for a batch of prompts, with a cache of keys and values."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpjax.errors import DpjaxError
from dpjax.models import Cache, DecoderConfig, apply, apply_cached, init_caches
from dpjax.types import PyTree, RandomKey, require_key


def choose_token(
    logits: Float[Array, " vocabulary"],
    key: RandomKey | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, ""]:
    """Draws one token. Temperature 0 takes the most likely; ``top_k``, ``top_p`` cut the tail.

    Example:
      >>> int(choose_token(jnp.array([0.0, 9.0, 1.0]), jax.random.key(0), temperature=0.0))
      1
      >>> int(choose_token(jnp.array([0.0, 9.0, 1.0]), jax.random.key(0), top_p=0.5))
      1
    """
    if temperature == 0.0:
        return jnp.argmax(logits).astype(jnp.int32)
    assert key is not None
    return jax.random.categorical(key, truncated_logits(logits, temperature, top_k, top_p)).astype(
        jnp.int32
    )


def truncated_logits(
    logits: Float[Array, " vocabulary"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Array, " vocabulary"]:
    """Logits of the distribution that is drawn from: minus infinity where a token is cut.

    Temperature 0 keeps only the most likely token.

    Example:
      >>> truncated_logits(jnp.array([0.0, 9.0, 1.0]), top_k=2).tolist()
      [-inf, 9.0, 1.0]
    """
    if temperature == 0.0:
        chosen = jnp.arange(logits.shape[0]) == jnp.argmax(logits)
        return jnp.where(chosen, jnp.zeros_like(logits), -jnp.inf)
    scaled = logits / temperature
    if top_k is not None:
        lowest_kept = jax.lax.top_k(scaled, min(top_k, scaled.shape[0]))[0][-1]
        scaled = jnp.where(scaled < lowest_kept, -jnp.inf, scaled)
    if top_p is not None:
        ordered = jnp.sort(scaled)[::-1]
        mass_before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
        # The smallest set whose mass reaches top_p: a token stays if the mass above it does not.
        lowest_kept = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf))
        scaled = jnp.where(scaled < lowest_kept, -jnp.inf, scaled)
    return scaled


class Sampling(NamedTuple):
    """How tokens are drawn; static for the compiler."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    stop_tokens: tuple[int, ...] = ()


class _Decoding(NamedTuple):
    """Where a batch of texts stands."""

    tokens: Int[Array, "batch length"]  # prompt and what was drawn, then zeros
    lengths: Int[Array, " batch"]  # of the prompts
    logits: Float[Array, "batch vocabulary"]  # for the next token
    caches: list[Cache] | None  # leading axis batch
    drawn: Int[Array, ""]
    is_done: Bool[Array, " batch"]


def _next_logits(
    config, params, tokens, caches, start, read, length
) -> tuple[Array, list[Cache] | None]:
    """Logits after token ``read`` of ``tokens``, which stand at ``start``, from cache or anew."""
    if caches is None:
        return apply(config, params, tokens)[length - 1], None
    return apply_cached(config, params, tokens, caches, start, read)


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "use_cache"))
def _begin(config, params, prompts, lengths, *, new_tokens, use_cache) -> _Decoding:
    batch, width = prompts.shape
    tokens = jnp.pad(prompts, ((0, 0), (0, new_tokens)))

    def one(prompt, buffer, length):
        caches = init_caches(config, width + new_tokens) if use_cache else None
        seen = prompt if use_cache else buffer
        return _next_logits(config, params, seen, caches, 0, length - 1, length)

    first: tuple[Any, Any] = jax.vmap(one)(prompts, tokens, lengths)
    nothing = jnp.zeros((), jnp.int32)
    return _Decoding(tokens, lengths, *first, nothing, jnp.zeros(batch, bool))


@functools.partial(
    jax.jit, static_argnames=("config", "sampling", "steps"), donate_argnames="state"
)
def _advance(config, params, state: _Decoding, keys, *, sampling, steps) -> _Decoding:
    """Draws up to ``steps`` tokens more for every text; stops early when all are done."""
    end = state.drawn + steps
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)

    def draw(logits, key, number):
        drawn_with = None if key is None else jax.random.fold_in(key, number)
        return choose_token(logits, drawn_with, *sampling[:3])

    def body(state: _Decoding) -> _Decoding:
        chosen = jax.vmap(draw, (0, None if keys is None else 0, None))(
            state.logits, keys, state.drawn
        )

        def one(buffer, length, caches, token):
            at = length + state.drawn
            buffer = buffer.at[at].set(token)
            seen = buffer if caches is None else token[None]
            return buffer, *_next_logits(config, params, seen, caches, at, 0, at + 1)

        tokens, logits, caches = jax.vmap(one)(state.tokens, state.lengths, state.caches, chosen)
        is_stop = jnp.any(chosen[:, None] == stops[None, :], axis=1)
        return _Decoding(
            tokens, state.lengths, logits, caches, state.drawn + 1, state.is_done | is_stop
        )

    return jax.lax.while_loop(lambda s: (s.drawn < end) & ~jnp.all(s.is_done), body, state)


def stream(
    config: DecoderConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    key: RandomKey | None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | Sequence[int] | None = None,
    use_cache: bool = True,
    tokens_per_step: int = 8,
) -> Iterator[list[list[int]]]:
    """Continues each prompt, yielding what was drawn as it comes.

    Arguments as for `generate`, all prompts in one batch.

    Args:
      tokens_per_step: tokens between two yields.

    Yields:
      The new tokens of each prompt since the last yield; nothing after a stop token.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> steps = list(stream(config, params, [[1, 2]], None, max_new_tokens=12, temperature=0.0))
      >>> [len(step[0]) for step in steps]
      [8, 4]
    """
    sampling = _sampling(config, prompts, max_new_tokens, temperature, top_k, top_p, stop_token)
    keys = _keys(key, len(prompts), sampling)
    width = _width(config, prompts, max_new_tokens)
    yield from _stream(
        config, params, prompts, width, keys, sampling, max_new_tokens, use_cache, tokens_per_step
    )


def _stream(
    config, params, prompts, width, keys, sampling, max_new_tokens, use_cache, tokens_per_step
):
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    state = _begin(config, params, padded, lengths, new_tokens=max_new_tokens, use_cache=use_cache)
    ended, seen = [False] * len(prompts), 0
    while seen < max_new_tokens and not all(ended):
        steps = min(tokens_per_step, max_new_tokens - seen)
        state = _advance(config, params, state, keys, sampling=sampling, steps=steps)
        tokens, drawn = np.asarray(state.tokens), int(state.drawn)
        fresh = []
        for row, length in enumerate(lengths.tolist()):
            new = [] if ended[row] else tokens[row, length + seen : length + drawn].tolist()
            stop = next((i for i, t in enumerate(new) if t in sampling.stop_tokens), None)
            ended[row] |= stop is not None
            fresh.append(new[:stop])
        seen = drawn
        yield fresh


def generate(
    config: DecoderConfig,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    key: RandomKey | None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | Sequence[int] | None = None,
    use_cache: bool = True,
    batch_size: int = 64,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      config, params: the model.
      prompts: token ids, each non-empty; lengths may differ.
      key: JAX random key; None only with temperature 0, which draws nothing. Every prompt has its
        own part of it, so a text does not depend on the batch that it was drawn in.
      max_new_tokens: tokens to draw per prompt.
      temperature: 0 is greedy; 1 samples the model's distribution.
      top_k, top_p: keep only the most likely tokens before drawing.
      stop_token: one or several; the continuation ends before the first, e.g. ``eos_id``.
      use_cache: keep keys and values of earlier tokens; without, every token recomputes them all.
      batch_size: prompts at once; the cache takes ``layers * 2 * kv_heads * head_width`` numbers
        for each token of each.

    Returns:
      The new tokens of each prompt, without the prompt.

    Raises:
      DpjaxError: an empty prompt, a token outside the vocabulary, a bad sampling setting, or a text
        beyond the positions that the model has.

    Guarantee:
      Reads only ``params``: by post-processing, text from a private model costs no more epsilon.

    Example:
      >>> from dpjax.models import decoder_config, init_params
      >>> config = decoder_config("nano", 300)
      >>> params = init_params(config, jax.random.key(0))
      >>> texts = generate(config, params, [[1, 2], [3]], jax.random.key(1), max_new_tokens=4)
      >>> [len(tokens) for tokens in texts]
      [4, 4]
    """
    sampling = _sampling(config, prompts, max_new_tokens, temperature, top_k, top_p, stop_token)
    if batch_size < 1:
        raise DpjaxError(f"batch_size is {batch_size}; it must be at least 1")
    keys, width = _keys(key, len(prompts), sampling), _width(config, prompts, max_new_tokens)
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        rows = np.arange(start, start + batch_size)
        missing = rows >= len(prompts)
        # A later batch that is not full repeats a prompt, to keep the compiled shape.
        rows = rows[~missing] if start == 0 else np.where(missing, start, rows)
        part = [prompts[row] for row in rows]
        part_keys = None if keys is None else keys[rows]
        steps = _stream(
            config,
            params,
            part,
            width,
            part_keys,
            sampling,
            max_new_tokens,
            use_cache,
            max_new_tokens,
        )
        drawn = next(iter(steps))
        texts += drawn[: len(prompts) - start]
    return texts


def _keys(key: RandomKey | None, count: int, sampling: Sampling) -> RandomKey | None:
    return jax.random.split(require_key(key), count) if sampling.temperature > 0 else None


def _width(config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Rounded up, so that prompts of similar length share one compilation."""
    width = -(-max(len(prompt) for prompt in prompts) // 16) * 16
    if config.positions == "learned":
        return min(width, config.max_positions - max_new_tokens)
    return width


def _sampling(config, prompts, max_new_tokens, temperature, top_k, top_p, stop_token) -> Sampling:
    """The checked settings."""
    stops = () if stop_token is None else stop_token
    stops = (int(stops),) if isinstance(stops, int) else tuple(map(int, stops))
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise DpjaxError("a prompt is empty; start it with the tokenizer's bos token")
    for prompt in prompts:
        outside = [t for t in prompt if not 0 <= t < config.vocabulary_size]
        if outside:
            raise DpjaxError(
                f"prompt token {outside[0]} is outside the vocabulary of {config.vocabulary_size}; "
                "encode the prompt with the model's own tokenizer"
            )
    if max_new_tokens < 1:
        raise DpjaxError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    longest = max(map(len, prompts))
    if config.positions == "learned" and longest + max_new_tokens > config.max_positions:
        raise DpjaxError(
            f"a prompt of {longest} and {max_new_tokens} new tokens are beyond the model's "
            f"{config.max_positions} positions; shorten one of them"
        )
    if temperature < 0:
        raise DpjaxError(f"temperature is {temperature}; it must be at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise DpjaxError(f"top_k is {top_k}; it must be at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise DpjaxError(f"top_p is {top_p}; it must be in (0, 1], or None")
    return Sampling(temperature, top_k, top_p, stops)
