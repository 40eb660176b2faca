"""The text of one client's batch, exactly, from the gradient of a decoder that it sent.

The gradient of a linear map is ``X^T D``: its columns lie in the span of the inputs ``X``. While a
batch has fewer positions than the model has features, the true inputs are the only ones in there.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import nnls

from dpjax.errors import DpjaxError
from dpjax.models import DecoderConfig, hidden_states, language_model_loss
from dpjax.types import PyTree, RandomKey, require_key

_ROWS = 128  # sequences in one compiled call
# The singular values of pure noise fall slowly: neighbours differ by less than this.
_LEAST_GAP = 10.0
_STRICTNESS = (0.3, 3.0, 30.0)  # tolerated distance from the second span, times the gap
_EXPLAINED = 0.9999  # cosine of the fit, above which the sequences found are taken for all


@dataclasses.dataclass(frozen=True)
class RecoveredTokens:
    """Which tokens the client's batch holds.

    Attributes:
      tokens: int64, sorted and distinct; those that the model read, not a last token that it only
        had to predict (with an untied head and "embedding").
      scores: float64[vocabulary], higher is more like a token of the batch.
      method: "embedding" or "span".
      rank: dimensions of the span of the inputs; None without a gap, when the span says nothing,
        and with "embedding".
    """

    tokens: np.ndarray
    scores: np.ndarray
    method: str
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class RecoveredSequences:
    """What `recover_sequences` read.

    Attributes:
      sequences: tuples of token ids, in order; empty if nothing was found.
      ranks: dimensions of the spans before the first and the second layer; None without a gap.
      match: cosine of the observed gradient and its best fit by those of ``sequences``; attackers
        can compute it, and 1 says that they explain it all. 0 without sequences.
      complete: False if the search was cut at its limit of prefixes or of candidates.
    """

    sequences: tuple[tuple[int, ...], ...]
    ranks: tuple[int | None, int | None]
    match: float
    complete: bool = True


class _Span:
    """Directions outside of the span of a layer's inputs, read from its gradient."""

    def __init__(self, config: DecoderConfig, gradient: PyTree, layer: int, rank: int | None):
        attention = gradient["blocks"][layer]["attention"]
        kernels = [_float64(attention[n]["kernel"]) for n in ("query", "key", "value")]
        matrix = np.concatenate(kernels, axis=1)
        if not np.all(np.isfinite(matrix)):
            raise DpjaxError("the observed gradient is not finite; leave such an update out")
        left, values, _ = np.linalg.svd(matrix, full_matrices=True)
        # Below the rounding of float32 gaps mean nothing.
        floor = max(values[0] * np.finfo(np.float32).eps / 4, np.finfo(np.float64).tiny)
        values = np.maximum(values, floor)
        ratios = values[:-1] / values[1:]
        self.rank = rank
        self.gap = math.inf
        self.tolerance = math.inf
        if rank is None and len(ratios) and ratios.max() >= _LEAST_GAP:
            self.rank = int(np.argmax(ratios)) + 1
            self.gap = float(ratios.max())
            # What lies behind the gap tilts the span by about its inverse.
            self.tolerance = float(np.clip(30.0 / self.gap, 1e-3, 0.1))
        self.outside = left[:, self.rank or 0 :]

    def distances(self, inputs: np.ndarray) -> np.ndarray:
        """Share of each row's length that lies outside of the span, in [0, 1]."""
        norms = np.maximum(np.linalg.norm(inputs, axis=-1), np.finfo(np.float64).tiny)
        return np.linalg.norm(inputs @ self.outside, axis=-1) / norms


def recover_tokens(
    config: DecoderConfig,
    params: PyTree,
    observed_gradient: PyTree,
    *,
    method: Literal["embedding", "span"] | None = None,
    positions: int = 1,
    count: int | None = None,
) -> RecoveredTokens:
    """The set of tokens in a batch, from the gradient of its language-model loss.

    "embedding": only the rows of tokens that were read have a gradient, whatever their number.
    That holds for an untied head; a tied one gives every row a gradient. "span" (DAGER) asks which
    vocabulary entries' normed embeddings lie in the span of the first attention layer's gradient;
    it works for both, for fewer distinct inputs than ``d_model``.

    Args:
      params: the global model that the client differentiated, pytree.
      observed_gradient: pytree like ``params``, at any positive scale.
      method: default: "embedding" for an untied head, "span" for a tied one.
      positions: with a learned position table, how many positions to try; rotary ones need 1.
      count: the number of distinct tokens if the attacker knows it: the best ``count`` are then
        returned. The strongest form, for noisy gradients.

    Raises:
      DpjaxError: stacked layers or adapters, "embedding" with a tied head, a gradient not finite.

    Source: Melis et al. (2019), section 4.1 for rows; Petrov et al. (2024), section 3 for the span.

    Example:
      >>> config = DecoderConfig(20, 2, 16, 2, 2, 16, tied=False)
      >>> from dpjax.models import init_params
      >>> params = init_params(config, jax.random.key(0))
      >>> record = {"tokens": jnp.array([5, 3, 5, 9]), "loss_mask": jnp.ones(4, bool)}
      >>> gradient = jax.jit(jax.grad(language_model_loss(config)))(params, record)
      >>> recover_tokens(config, params, gradient).tokens.tolist()  # 9 was never read
      [3, 5]
    """
    _check(config, params, observed_gradient)
    if method is None:
        method = "span" if config.tied else "embedding"
    if count is not None and not 0 <= count <= config.vocabulary_size:
        raise DpjaxError(f"count is {count}; pass 0 to {config.vocabulary_size}, the vocabulary")
    if method == "embedding":
        if config.tied:
            raise DpjaxError(
                "method is 'embedding' with a tied head: every row is used; use 'span'"
            )
        rows = _float64(observed_gradient["embedding"]["embedding"])
        scores = np.linalg.norm(rows, axis=1)
        found, rank = np.flatnonzero(scores > 0), None
    elif method == "span":
        span = _Span(config, observed_gradient, 0, count)
        distances = _first_layer_distances(config, params, span, positions).min(axis=1)
        scores, rank = -distances, span.rank
        found = (
            np.flatnonzero(distances <= span.tolerance) if rank is not None else np.zeros(0, int)
        )
    else:
        raise DpjaxError(f"method is {method!r}; use 'embedding' or 'span'")
    if count is not None:
        found = np.sort(np.argsort(-scores, kind="stable")[:count])
    return RecoveredTokens(found.astype(np.int64), scores, method, rank)


def recover_sequences(
    config: DecoderConfig,
    params: PyTree,
    observed_gradient: PyTree,
    *,
    max_length: int,
    max_prefixes: int = 256,
    max_candidates: int = 1024,
) -> RecoveredSequences:
    """The token sequences of a batch in order, by span checks before the first and second layer.

    A causal decoder's input to layer two at a position depends on the tokens up to there, so
    a prefix that the batch does not hold is outside of that layer's span: sequences are grown token
    by token. The last token of each, which is predicted and never read, follows from the head's
    gradient: ``H^T (P - Y)`` with known ``H`` has its only negative entries at the targets.

    Limits: fewer distinct prefixes in the batch than ``d_model``; every position in the
    loss. A sequence that is twice in the batch is returned once. With rotary positions "a a b" has
    the gradient of "a a" and "a b" as long as only "a" was read, so a run of one token at
    the beginning may come out in pieces. What the spans leave open, such as
    last tokens that are read elsewhere under a tied head, is settled by a nonnegative fit
    of the candidates' whole gradients to the observed one: memory of one gradient for each.

    Args:
      params: the global model that the client differentiated; at least two layers.
      observed_gradient: pytree like ``params``, at any positive scale; of the sum or mean over
        sequences of `language_model_loss`.
      max_length: tokens of the longest sequence, with the last one.
      max_prefixes: where the search stops if the spans do not tell tokens apart.
      max_candidates: where it stops if the head does not tell last tokens apart.

    Raises:
      DpjaxError: as `recover_tokens`; a single layer; ``max_length`` below 2.

    Source: Petrov et al. (2024), "DAGER: exact gradient inversion for large language models",
      section 3. There the last token is not looked at.

    Example:
      >>> config = DecoderConfig(20, 2, 16, 2, 2, 16)
      >>> from dpjax.models import init_params
      >>> params = init_params(config, jax.random.key(0))
      >>> record = {"tokens": jnp.array([5, 3, 5, 9]), "loss_mask": jnp.ones(4, bool)}
      >>> gradient = jax.jit(jax.grad(language_model_loss(config)))(params, record)
      >>> recover_sequences(config, params, gradient, max_length=4).sequences
      ((5, 3, 5, 9),)
    """
    _check(config, params, observed_gradient)
    if config.num_layers < 2:
        raise DpjaxError("num_layers is 1; the order of tokens is read from the second layer")
    if max_length < 2:
        raise DpjaxError(f"max_length is {max_length}; a sequence has 2 tokens or more")
    steps = max_length - 1
    if config.positions == "learned" and steps > config.max_positions:
        raise DpjaxError(f"max_length is {max_length}; the model has {config.max_positions} places")
    learned = config.positions == "learned"
    spans = [_Span(config, observed_gradient, layer, None) for layer in (0, 1)]
    ranks = (spans[0].rank, spans[1].rank)
    distances = _first_layer_distances(config, params, spans[0], steps if learned else 1)
    possible = distances <= spans[0].tolerance
    if not config.tied:
        # Exact whatever the length, so it can only help.
        rows = _float64(observed_gradient["embedding"]["embedding"])
        possible &= np.any(rows != 0, axis=1)[:, None]
    if None in ranks or not possible.any():
        return RecoveredSequences((), ranks, 0.0)
    by_place = [np.flatnonzero(possible[:, p if learned else 0]).tolist() for p in range(steps)]
    best = RecoveredSequences((), ranks, 0.0)
    # Wrong prefixes may be nearer than the gap would let right ones be: strictly first, and more
    # loosely only while the sequences found do not explain the gradient.
    for strictness in _STRICTNESS:
        tolerance = float(np.clip(strictness / spans[1].gap, 1e-4, 0.1))
        nodes = _grown(config, params, spans[1], by_place, tolerance, max_prefixes)
        candidates = (
            [] if nodes is None
            else _with_last_tokens(config, params, observed_gradient, nodes, steps)
        )  # fmt: skip
        if nodes is None or len(candidates) > max_candidates:
            return dataclasses.replace(best, complete=False)
        if candidates:
            kept, match = _fitted(config, params, observed_gradient, candidates, max_length)
            if match > best.match:
                best = RecoveredSequences(kept, ranks, match)
        if best.match > _EXPLAINED:
            break
    return best


def text_recovery(
    recovered: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]
) -> dict[str, float]:
    """How much of the true sequences is in the recovered ones; each in [0, 1], higher is more.

    Args:
      recovered: token sequences in any order, or none.
      truth: at least one sequence, none empty.

    Returns:
      ``exact_sequences``: share of true sequences found to the last token. ``rouge_l``: mean over
      true sequences of the best F1 by longest common subsequence. ``token_recall`` and
      ``token_precision``: of the sets of tokens; a precision over nothing is 0.

    Raises:
      DpjaxError: no truth, or an empty sequence in it.

    Source: Lin (2004), "ROUGE", section 3 for the longest common subsequence.

    Example:
      >>> text_recovery([[1, 2, 3]], [[1, 2, 4]])["exact_sequences"]
      0.0
    """
    if not truth or any(len(t) == 0 for t in truth):
        raise DpjaxError(f"truth holds {len(truth)} sequences, or an empty one; pass what was sent")
    found, wanted = [tuple(r) for r in recovered], [tuple(t) for t in truth]
    tokens = {x for t in wanted for x in t}
    guessed = {x for r in found for x in r}
    return {
        "exact_sequences": float(np.mean([t in found for t in wanted])),
        "rouge_l": float(
            np.mean([max((_rouge_l(r, t) for r in found), default=0) for t in wanted])
        ),
        "token_recall": len(tokens & guessed) / len(tokens),
        "token_precision": len(tokens & guessed) / len(guessed) if guessed else 0.0,
    }


def guess_sequences(
    vocabulary_size: int, num: int, length: int, key: RandomKey
) -> tuple[tuple[int, ...], ...]:
    """Uniformly random sequences: what an attacker without any gradient would say.

    Example:
      >>> len(guess_sequences(20, 2, 6, jax.random.key(0))[0])
      6
    """
    if min(vocabulary_size, num, length) < 1:
        raise DpjaxError(
            f"{num} sequences of {length} tokens out of {vocabulary_size}: all above 0"
        )
    drawn = jax.random.randint(require_key(key), (num, length), 0, vocabulary_size)
    return tuple(tuple(row) for row in np.asarray(drawn).tolist())


def _check(config: DecoderConfig, params: PyTree, gradient: PyTree) -> None:
    if config.segments or config.lora is not None:
        raise DpjaxError("config has segments or lora; the attack reads whole, unstacked layers")
    if jax.tree.structure(params) != jax.tree.structure(gradient):
        raise DpjaxError("observed_gradient is not a pytree like params; pass the whole gradient")


def _float64(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def _first_layer_distances(
    config: DecoderConfig, params: PyTree, span: _Span, positions: int
) -> np.ndarray:
    """Distance of every (token, position) to the first layer's span, [vocabulary, positions]."""
    # A token repeated at all positions: the first layer's input looks at no other token.
    repeated = [(token,) * positions for token in range(config.vocabulary_size)]
    return span.distances(_states(config, params, 0, repeated, positions))


def _states(
    config: DecoderConfig,
    params: PyTree,
    layer: int | None,
    sequences: Sequence[tuple[int, ...]],
    length: int,
) -> np.ndarray:
    """Inputs to ``layer``'s attention, or the final states; [sequences, length, d_model].

    What stands behind a sequence's end is of no meaning.
    """
    if layer is not None:
        # Up to that layer, with its norm for the last one. Zeros make a block the identity.
        blocks = {i: params["blocks"][i] for i in range(layer)}
        blocks = blocks or {0: jax.tree.map(jnp.zeros_like, params["blocks"][0])}
        norm = params["blocks"][layer]["attention_norm"]
        params = {**params, "blocks": blocks, "final_norm": norm}
        local = config.local_layers[: len(blocks)]
        config = dataclasses.replace(config, num_layers=len(blocks), local_layers=local)
    padded = np.zeros((-(-len(sequences) // _ROWS) * _ROWS, length), np.int32)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)] = tokens
    parts = [
        np.asarray(_all_states(config, params, jnp.asarray(padded[i : i + _ROWS])), np.float64)
        for i in range(0, len(padded), _ROWS)
    ]
    return np.concatenate(parts)[: len(sequences)]


@functools.partial(jax.jit, static_argnums=0)
def _all_states(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "rows time"]
) -> Float[Array, "rows time d_model"]:
    # Accelerators round products to fewer bits otherwise, which would close the gap.
    with jax.default_matmul_precision("highest"):
        return jax.vmap(lambda t: hidden_states(config, params, t))(tokens)


def _grown(
    config: DecoderConfig,
    params: PyTree,
    span: _Span,
    by_place: list[list[int]],
    tolerance: float,
    max_prefixes: int,
) -> list[tuple[int, ...]] | None:
    """Every prefix whose inputs to the second layer are in its span; None if there are too many."""
    alive: list[tuple[int, ...]] = [()]
    nodes: list[tuple[int, ...]] = []
    for place, allowed in enumerate(by_place):
        longer = [(*prefix, token) for prefix in alive for token in allowed]
        if not longer:
            break
        inputs = _states(config, params, 1, longer, len(by_place))[:, place]
        passes = span.distances(inputs) <= tolerance
        alive = [p for p, passed in zip(longer, passes, strict=True) if passed]
        nodes += alive
        if len(nodes) > max_prefixes:
            return None
    return nodes


def _fitted(
    config: DecoderConfig,
    params: PyTree,
    gradient: PyTree,
    candidates: list[tuple[int, ...]],
    length: int,
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Candidates that the observed gradient has a share of, and the cosine of the fit.

    The gradient of a batch is the weighted sum of its sequences': who has no weight is not in it.
    """
    columns = [_flat(_gradient(config, params, text, length)) for text in candidates]
    matrix, observed = np.stack(columns, axis=1), _flat(gradient)
    weights, _ = nnls(*_reduced(matrix, observed))
    fit = matrix @ weights
    scale = float(np.linalg.norm(fit) * np.linalg.norm(observed))
    if scale <= 0:
        return (), 0.0
    kept = tuple(c for c, w in zip(candidates, weights, strict=True) if w > 0.05 * weights.max())
    return kept, float(fit @ observed) / scale


def _with_last_tokens(
    config: DecoderConfig,
    params: PyTree,
    gradient: PyTree,
    nodes: list[tuple[int, ...]],
    steps: int,
) -> list[tuple[int, ...]]:
    """Sequences that may have been sent: prefixes, each with a token predicted last."""
    if not nodes:
        return []
    states = _states(config, params, None, nodes, steps)
    states = states[np.arange(len(nodes)), [len(n) - 1 for n in nodes]]
    # "a" and "a a" have one state: attention over equal values gives that value.
    groups = np.zeros(len(nodes), int)
    unlike: list[int] = []
    for i, state in enumerate(states):
        gaps = [float(np.linalg.norm(state - states[j]) / np.linalg.norm(state)) for j in unlike]
        if not gaps or min(gaps) > 1e-3:
            unlike.append(i)
            gaps.append(0.0)
        groups[i] = int(np.argmin(gaps))
    head = _float64(
        gradient["embedding"]["embedding"] if config.tied else gradient["head"]["kernel"]
    )
    # One column for each vocabulary entry: H^T (P - Y), so pinv(H^T) gives P - Y for each state.
    solved = np.linalg.pinv(states[unlike].T) @ (head.T if config.tied else head)
    # A tied head's rows of tokens that were read hold the input's gradient as well.
    read = sorted({token for node in nodes for token in node}) if config.tied else []
    solved[:, read] = 0.0
    children: dict[tuple[int, ...], set[int]] = {}
    for node in nodes:
        children.setdefault(node[:-1], set()).add(node[-1])
    found: list[tuple[int, ...]] = []
    for node, group in zip(nodes, groups, strict=True):
        row = solved[group]
        targets = np.flatnonzero(row < -0.05 * np.abs(row).max()).tolist()
        follow = children.get(node, set())
        if config.tied and not targets and not follow:
            targets = read
        # What follows in one sequence may be where another ends; the fit will tell.
        found += [(*node, t) for t in sorted({*targets, *(follow if config.tied else ())})]
    return found


def _reduced(matrix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same least-squares problem with as many rows as columns."""
    orthogonal, triangle = np.linalg.qr(matrix)
    return triangle, orthogonal.T @ target


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([_float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def _gradient(
    config: DecoderConfig, params: PyTree, sequence: tuple[int, ...], length: int
) -> PyTree:
    tokens, mask = np.zeros(length, np.int32), np.arange(length) < len(sequence)
    tokens[: len(sequence)] = sequence
    return _record_gradient(config, params, jnp.asarray(tokens), jnp.asarray(mask))


@functools.partial(jax.jit, static_argnums=0)
def _record_gradient(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, " time"], mask: Array
) -> PyTree:
    with jax.default_matmul_precision("highest"):
        example = {"tokens": tokens, "loss_mask": mask}
        return jax.grad(language_model_loss(config, 1.0))(params, example)


def _rouge_l(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    lengths = [0] * (len(other) + 1)
    for x in one:
        before = lengths[:]
        for j, y in enumerate(other):
            lengths[j + 1] = before[j] + 1 if x == y else max(before[j + 1], lengths[j])
    return 2.0 * lengths[-1] / (len(one) + len(other))
