"""Local privacy: every client adds noise before anything leaves it, and trusts nobody."""

from collections.abc import Callable
from typing import Literal

import dp_accounting
import jax
import jax.numpy as jnp

from dpjax.clipping.rules import clip_rule
from dpjax.errors import DpjaxError
from dpjax.federated.algorithm import Algorithm, LocalResult
from dpjax.federated.private import clip_update
from dpjax.noise import gaussian_noise_like
from dpjax.types import PyTree, RandomKey

# Sets the noise apart from whatever the inner algorithm draws with the client's key.
_NOISE_STREAM = 2**31 - 3


def locally_private(
    algorithm: Algorithm, l2_clip_norm: float, noise_multiplier: float
) -> Algorithm:
    """The same algorithm, where each client clips what it sends and adds Gaussian noise to it.

    Args:
      algorithm: e.g. `fed_avg`; its weights are replaced by 1.
      l2_clip_norm: of all that one client sends in a round.
      noise_multiplier: stddev / sensitivity. In the local model the two neighbours are any two data
        sets of the client, so the sensitivity is ``2 * l2_clip_norm``.

    Raises:
      DpjaxError: a norm or multiplier that is not positive and finite.

    Guarantee:
      What one client sends in all rounds satisfies ``local_dp_event(noise_multiplier, rounds that
      it took part in)`` under replacing all of its data, against everybody, the server included.
      An update that is not finite is sent as noise around zero: a rejection would tell. Metrics are
      not sent, and all weights are 1. That a client takes part, and what it keeps for itself, is
      not covered. Noise is drawn and added in float32 (see `gaussian_privatizer`), with the
      client's key of the round: in a simulation this comes from the one key of the run; a real
      client must make its own, from the operating system's entropy.

    Source: Kasiviswanathan et al. (2011) for the model; Dwork and Roth (2014), appendix A.

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> inner = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.5))
      >>> locally_private(inner, l2_clip_norm=1.0, noise_multiplier=2.0).name
      'locally private fed_avg'
    """
    rule, stddev = clip_rule(l2_clip_norm), _spread(l2_clip_norm, noise_multiplier)

    def send(update, key):
        clipped, _ = clip_update(update, rule)
        clipped = _zeros_if_not_finite(clipped)
        return jax.tree.map(jnp.add, clipped, gaussian_noise_like(clipped, stddev, key))

    return _sent_by(algorithm, send)


def locally_private_laplace(
    algorithm: Algorithm, l1_clip_norm: float, noise_multiplier: float
) -> Algorithm:
    """`locally_private` with Laplace noise: clipped in L1, and private with delta 0.

    Args:
      algorithm: e.g. `fed_avg`; its weights are replaced by 1.
      l1_clip_norm: of all that one client sends in a round.
      noise_multiplier: scale / sensitivity, with sensitivity ``2 * l1_clip_norm``: a round costs
        epsilon = 1 / noise_multiplier.

    Guarantee:
      As `locally_private`, with ``local_dp_event(noise_multiplier, rounds, "laplace")``; in pure
      terms, rounds / noise_multiplier nats.

    Source: Dwork, McSherry, Nissim and Smith (2006).

    Example:
      >>> import optax
      >>> from dpjax.federated import fed_avg
      >>> inner = fed_avg(lambda w, e: (w - e) ** 2, optax.sgd(0.5))
      >>> locally_private_laplace(inner, l1_clip_norm=1.0, noise_multiplier=2.0).normalize_by
    """
    scale = _spread(l1_clip_norm, noise_multiplier)

    def send(update, key):
        leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x.astype(jnp.float32), update))
        norm = sum((jnp.sum(jnp.abs(x)) for x in leaves), jnp.zeros((), jnp.float32))
        factor = jnp.minimum(1.0, l1_clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        clean = jnp.isfinite(norm)
        leaves = [jnp.where(clean, x * factor, 0.0) for x in leaves]
        keys = jax.random.split(key, max(1, len(leaves)))
        return structure.unflatten(
            x + scale * jax.random.laplace(k, x.shape, jnp.float32)
            for x, k in zip(leaves, keys, strict=False)
        )

    return _sent_by(algorithm, send)


def local_dp_event(
    noise_multiplier: float,
    participations: int,
    noise: Literal["gaussian", "laplace"] = "gaussian",
) -> dp_accounting.DpEvent:
    """What ``participations`` rounds reveal of one client, for `dpjax.epsilon` under replace_one.

    Example:
      >>> import dpjax
      >>> event = local_dp_event(10.0, participations=4)
      >>> print(f"{dpjax.epsilon(event, 1e-5, 'pld', 'replace_one'):.3f}")
      0.726
    """
    if participations < 0 or not noise_multiplier > 0:
        raise DpjaxError(
            f"participations is {participations} and noise_multiplier {noise_multiplier}; the one "
            "counts rounds, the other must be positive"
        )
    if participations == 0:
        return dp_accounting.NoOpDpEvent()
    if noise not in ("gaussian", "laplace"):
        raise DpjaxError(f"noise is {noise!r}; use 'gaussian' or 'laplace'")
    kind = dp_accounting.GaussianDpEvent
    if noise == "laplace":
        kind = dp_accounting.LaplaceDpEvent
    return dp_accounting.SelfComposedDpEvent(kind(noise_multiplier), participations)


def _spread(clip_norm: float, noise_multiplier: float) -> float:
    if not (0 < clip_norm < float("inf") and 0 < noise_multiplier < float("inf")):
        raise DpjaxError(
            f"the clip norm is {clip_norm} and noise_multiplier {noise_multiplier}; both must be "
            "positive and finite"
        )
    return noise_multiplier * 2 * clip_norm


def _zeros_if_not_finite(clipped: PyTree) -> PyTree:
    """`clip_update` marks such an update by NaN in every number."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), clipped)


def _sent_by(algorithm: Algorithm, send: Callable[[PyTree, RandomKey], PyTree]) -> Algorithm:
    if algorithm.normalize_by is not None or algorithm.combine is not None:
        raise DpjaxError(
            f"{algorithm.name} has its own normalize_by or combine; make the plain algorithm "
            "locally private"
        )

    def local_update(server, client, data, key):
        result = algorithm.local_update(server, client, data, key)
        update = send(result.update, jax.random.fold_in(key, _NOISE_STREAM))
        # Nothing else leaves the client: neither its number of examples nor its loss.
        return LocalResult(update, jnp.ones((), jnp.float32), result.client, {})

    return algorithm._replace(name=f"locally private {algorithm.name}", local_update=local_update)
