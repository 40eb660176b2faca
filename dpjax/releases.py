"""What a run's releases cost together: the one place where sampler and noise strategy meet."""

import dp_accounting

from dpjax import sampling as samplers
from dpjax.strategies import BandedToeplitz, Strategy


def num_events(sampler: samplers.Sampler, iterations: int, strategy: Strategy | None = None) -> int:
    """How many of ``sampler.dp_event`` the first iterations cost.

    Example:
      >>> from dpjax.strategies import Tree
      >>> sampler = samplers.CyclicSampler(100, fixed_batch_size=10)
      >>> num_events(sampler, 25), num_events(sampler, 25, Tree(40))
      (3, 1)
    """
    if strategy is not None and isinstance(sampler, samplers.CyclicSampler):
        return min(iterations, 1)
    return sampler.num_events(iterations)


def released_dp_event(
    sampler: samplers.Sampler,
    noise_multiplier: float,
    iterations: int,
    strategy: Strategy | None = None,
) -> dp_accounting.DpEvent:
    """Event of the first ``iterations`` iterations of a run.

    Args:
      sampler: which examples took part when.
      noise_multiplier: of one release with independent noise; with a strategy, of all releases
        together (of one round of the groups, if these are sampled by Poisson).
      iterations: so far, from the run's first.
      strategy: of correlated noise.

    Guarantee:
      No guarantee is claimed beyond the strategy's own iterations, or for noise of more bands than
      there are iterations between an example's turns.

    Example:
      >>> from dpjax.strategies import Tree
      >>> sampler = samplers.CyclicSampler(100, fixed_batch_size=10)
      >>> released_dp_event(sampler, 2.0, 25, Tree(40))
      GaussianDpEvent(noise_multiplier=2.0)
      >>> released_dp_event(sampler, 2.0, 41, Tree(40))
      NonPrivateDpEvent()
    """
    if iterations > 0 and noise_multiplier == 0.0:
        return dp_accounting.NonPrivateDpEvent()
    if strategy is None or iterations == 0:
        return samplers.composed_dp_event(sampler, noise_multiplier, iterations)
    covered = isinstance(sampler, samplers.CyclicSampler) or (
        isinstance(sampler, samplers.CyclicPoissonSampler)
        and isinstance(strategy, BandedToeplitz)
        and strategy.num_bands <= sampler.num_groups
    )
    if iterations > strategy.iterations or not covered:
        return dp_accounting.NonPrivateDpEvent()
    if isinstance(sampler, samplers.CyclicSampler):
        return sampler.dp_event(noise_multiplier)
    return samplers.composed_dp_event(sampler, noise_multiplier, iterations)
