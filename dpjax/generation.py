"""Text from a model: jitted sampling for a batch of prompts."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, apply
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
    scaled = logits / temperature
    assert key is not None
    if top_k is not None:
        lowest_kept = jax.lax.top_k(scaled, min(top_k, scaled.shape[0]))[0][-1]
        scaled = jnp.where(scaled < lowest_kept, -jnp.inf, scaled)
    if top_p is not None:
        ordered = jnp.sort(scaled)[::-1]
        mass_before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
        # The smallest set whose mass reaches top_p: a token stays if the mass above it does not.
        lowest_kept = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf))
        scaled = jnp.where(scaled < lowest_kept, -jnp.inf, scaled)
    return jax.random.categorical(key, scaled).astype(jnp.int32)


@functools.partial(
    jax.jit, static_argnames=("config", "new_tokens", "temperature", "top_k", "top_p")
)
def _generate(config, params, prompts, lengths, keys, *, new_tokens, temperature, top_k, top_p):
    buffers = jnp.pad(prompts, ((0, 0), (0, new_tokens)))

    def one(buffer, length, key):
        def body(i, buffer):
            at = length + i
            logits = apply(config, params, buffer)[at - 1]
            drawn_with = None if key is None else jax.random.fold_in(key, i)
            token = choose_token(logits, drawn_with, temperature, top_k, top_p)
            return buffer.at[at].set(token)

        buffer = jax.lax.fori_loop(0, new_tokens, body, buffer)
        return jax.lax.dynamic_slice(buffer, (length,), (new_tokens,))

    return jax.vmap(one)(buffers, lengths, keys)


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
    stop_token: int | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      config, params: the model.
      prompts: token ids, each non-empty; lengths may differ.
      key: JAX random key; None only with temperature 0, which draws nothing.
      max_new_tokens: tokens to draw per prompt.
      temperature: 0 is greedy; 1 samples the model's distribution.
      top_k, top_p: keep only the most likely tokens before drawing.
      stop_token: the continuation ends before this token, e.g. the tokenizer's ``eos_id``.

    Returns:
      The new tokens of each prompt, without the prompt.

    Raises:
      DpjaxError: an empty prompt, a token outside the vocabulary, a bad sampling setting.

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
    if temperature < 0:
        raise DpjaxError(f"temperature is {temperature}; it must be at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise DpjaxError(f"top_k is {top_k}; it must be at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise DpjaxError(f"top_p is {top_p}; it must be in (0, 1], or None")
    keys = None
    if temperature > 0:
        keys = jax.random.split(require_key(key), len(prompts))
    # Round the width up, so that prompts of similar length share one compilation.
    width = -(-max(len(prompt) for prompt in prompts) // 16) * 16
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    drawn = _generate(
        config,
        params,
        padded,
        lengths,
        keys,
        new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    texts = np.asarray(drawn).tolist()
    if stop_token is None:
        return texts
    return [t[: t.index(stop_token)] if stop_token in t else t for t in texts]
