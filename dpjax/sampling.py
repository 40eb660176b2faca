"""Which examples take part in which iteration, and the accounting that this sampler deserves.

A sampler is a frozen description; ``sampler.batch(step)`` depends on its key and the step alone, so
the sampler's position is one integer and a resumed run draws the batches it would have drawn. Each
sampler also builds its own ``dp_event``: no other part may claim an amplification for it.
"""

import dataclasses
import math
from typing import ClassVar, TypeAlias

import dp_accounting
import jax
import numpy as np
from scipy import stats

from dpjax.errors import DpjaxError
from dpjax.types import Batch, NeighboringRelation, RandomKey, require_key

# A Poisson batch overflows its physical shape with at most this probability per iteration. An
# overflow costs one more compilation, never an example, so this is not a privacy parameter.
_OVERFLOW_PROBABILITY = 1e-12


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Fields all samplers share."""

    population: int
    # Secret: it names the rows. None describes a sampler that is only to be accounted for.
    key: RandomKey | None = dataclasses.field(default=None, repr=False, compare=False)
    multiple_of: int = 1
    """The physical batch is a multiple of this (microbatch size times devices)."""

    def __post_init__(self):
        if self.key is not None:
            object.__setattr__(self, "key", require_key(self.key))
        if self.population < 1:
            raise DpjaxError(f"population is {self.population}; a data set needs an example")

    def _padded(self, size: int) -> int:
        return max(1, -(-size // self.multiple_of)) * self.multiple_of

    def _batch(self, indices: np.ndarray, physical: int) -> Batch:
        """Fills the physical shape with padding rows that repeat row 0."""
        padded = np.zeros(physical, np.int32)
        padded[: len(indices)] = indices
        return Batch(padded, np.arange(physical) >= len(indices))

    def _bits(self, step: int, stream: int, size: int) -> np.ndarray:
        """Uniform uint32[size] for one step; streams are independent of each other."""
        key = jax.random.fold_in(jax.random.fold_in(require_key(self.key), step), stream)
        return np.asarray(jax.random.bits(key, (size,), np.uint32))


def _poisson_sample(bits: np.ndarray, sampling_probability: float) -> np.ndarray:
    """Rows with ``bits < floor(q * 2**32)``: taken with a probability never above q.

    A float32 uniform has 2**-23 steps, which at q = 1e-5 may sample 1% more often than was
    accounted for. Integers round the other way.
    """
    threshold = math.floor(sampling_probability * 2**32)
    if threshold >= 2**32:
        return np.arange(len(bits), dtype=np.int32)
    return np.flatnonzero(bits < np.uint32(threshold)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PoissonSampler(_Sampler):
    """Each example joins each batch independently with ``sampling_probability``.

    The physical batch has a fixed shape, ``physical_batch_size``; unused rows are padding. A batch
    larger than that (probability below 1e-12 per iteration) comes in twice the shape: no example
    is ever dropped, because the accounting does not know of dropping.

    Guarantee:
      Inclusion is independent over examples and iterations with probability at most
      ``sampling_probability`` (within 2.4e-10 of it). Neighbouring relation: add-or-remove-one or
      replace-special. The realised batch size is private: divide by no function of it.

    Example:
      >>> import jax
      >>> sampler = PoissonSampler(1000, jax.random.key(0), sampling_probability=0.1)
      >>> batch = sampler.batch(0)
      >>> batch.indices.shape, 60 < (~batch.is_padding_example).sum() < 140
      ((173,), np.True_)
    """

    sampling_probability: float = 0.0
    name: ClassVar[str] = "poisson"

    def __post_init__(self):
        super().__post_init__()
        _check_probability(self.sampling_probability)

    @property
    def expected_batch_size(self) -> float:
        return self.population * self.sampling_probability

    @property
    def physical_batch_size(self) -> int:
        tail = stats.binom.isf(_OVERFLOW_PROBABILITY, self.population, self.sampling_probability)
        return self._padded(min(int(tail), self.population))

    def batch(self, step: int) -> Batch:
        """Rows of iteration ``step`` (int >= 0): shapes (physical_batch_size,)."""
        indices = _poisson_sample(self._bits(step, 0, self.population), self.sampling_probability)
        physical = self.physical_batch_size
        while len(indices) > physical:
            physical *= 2
        return self._batch(indices, physical)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Event of one iteration."""
        return dp_accounting.PoissonSampledDpEvent(
            self.sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)
        )

    def num_events(self, iterations: int) -> int:
        """How many of `dp_event` so many iterations cost."""
        return iterations

    neighboring_relations: ClassVar = (
        NeighboringRelation.ADD_OR_REMOVE_ONE,
        NeighboringRelation.REPLACE_SPECIAL,
    )


@dataclasses.dataclass(frozen=True)
class TruncatedPoissonSampler(_Sampler):
    """Poisson sampling whose batches are cut to ``truncated_batch_size`` at random.

    The physical batch never exceeds ``truncated_batch_size``. Truncation couples the examples, so
    this is another mechanism than Poisson sampling, with its own event.

    Guarantee:
      The kept rows of an overfull batch are a uniformly random subset. Neighbouring relation:
      add-or-remove-one, with the population public.

    Source: Ganesh et al. (2025), "Truncated Poisson sampling", arXiv 2508.15089.

    Example:
      >>> import jax
      >>> sampler = TruncatedPoissonSampler(
      ...     1000, jax.random.key(0), sampling_probability=0.1, truncated_batch_size=90)
      >>> int((~sampler.batch(3).is_padding_example).sum())
      90
    """

    sampling_probability: float = 0.0
    truncated_batch_size: int = 0
    name: ClassVar[str] = "truncated_poisson"

    def __post_init__(self):
        super().__post_init__()
        _check_probability(self.sampling_probability)
        if self.truncated_batch_size < 1:
            raise DpjaxError(
                f"truncated_batch_size is {self.truncated_batch_size}; use a positive integer, "
                f"e.g. twice the expected batch of {self.expected_batch_size:g}"
            )

    @property
    def expected_batch_size(self) -> float:
        return self.population * self.sampling_probability

    @property
    def physical_batch_size(self) -> int:
        return self._padded(min(self.truncated_batch_size, self.population))

    def batch(self, step: int) -> Batch:
        """Rows of iteration ``step`` (int >= 0): shapes (physical_batch_size,)."""
        indices = _poisson_sample(self._bits(step, 0, self.population), self.sampling_probability)
        if len(indices) > self.truncated_batch_size:
            # Random priorities per example, ties (1 in 2**32 a pair) broken by position.
            priority = self._bits(step, 1, self.population)[indices]
            kept = np.argsort(priority, kind="stable")[: self.truncated_batch_size]
            indices = np.sort(indices[kept])
        return self._batch(indices, self.physical_batch_size)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Event of one iteration."""
        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.population,
            sampling_probability=self.sampling_probability,
            truncated_batch_size=self.truncated_batch_size,
            noise_multiplier=noise_multiplier,
        )

    def num_events(self, iterations: int) -> int:
        """How many of `dp_event` so many iterations cost."""
        return iterations

    neighboring_relations: ClassVar = (NeighboringRelation.ADD_OR_REMOVE_ONE,)


@dataclasses.dataclass(frozen=True)
class FixedSizeSampler(_Sampler):
    """Every batch is a fresh uniformly random subset of ``fixed_batch_size`` examples.

    Guarantee:
      Subsets are drawn without replacement, independently over iterations. Neighbouring relation:
      replace-one only (the batch size says how many examples there are), so the sensitivity is
      twice the clip norm. Accounted by Wang, Balle and Kasiviswanathan (2019), Theorem 27.

    Example:
      >>> import jax
      >>> FixedSizeSampler(100, jax.random.key(0), fixed_batch_size=8).batch(0).indices.shape
      (8,)
    """

    fixed_batch_size: int = 0
    name: ClassVar[str] = "fixed_size"

    def __post_init__(self):
        super().__post_init__()
        _check_fixed(self.fixed_batch_size, self.population)

    @property
    def expected_batch_size(self) -> float:
        return float(self.fixed_batch_size)

    @property
    def physical_batch_size(self) -> int:
        return self._padded(self.fixed_batch_size)

    def batch(self, step: int) -> Batch:
        """Rows of iteration ``step`` (int >= 0): shapes (physical_batch_size,)."""
        order = np.argsort(self._bits(step, 0, self.population), kind="stable")
        chosen = np.sort(order[: self.fixed_batch_size]).astype(np.int32)
        return self._batch(chosen, self.physical_batch_size)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Event of one iteration."""
        return dp_accounting.SampledWithoutReplacementDpEvent(
            self.population,
            self.fixed_batch_size,
            dp_accounting.GaussianDpEvent(noise_multiplier),
        )

    def num_events(self, iterations: int) -> int:
        """How many of `dp_event` so many iterations cost."""
        return iterations

    neighboring_relations: ClassVar = (NeighboringRelation.REPLACE_ONE,)


@dataclasses.dataclass(frozen=True)
class ShuffledSampler(_Sampler):
    """Each epoch walks through a fresh random order in batches of ``fixed_batch_size``.

    What most training code does. No amplification by sampling is claimed for it: one example is in
    one batch of an epoch, so an epoch costs one Gaussian release, whatever the batch size.

    Guarantee:
      Each example appears exactly once per epoch; the last batch of an epoch may be short.
      Neighbouring relation: replace-special (an example against a blank in its place) or
      replace-one; adding or removing one would shift all batches after it.

    Example:
      >>> import jax
      >>> sampler = ShuffledSampler(10, jax.random.key(0), fixed_batch_size=4)
      >>> rows = [sampler.batch(i) for i in range(3)]
      >>> sorted(int(i) for b in rows for i in b.indices[~b.is_padding_example])
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    fixed_batch_size: int = 0
    name: ClassVar[str] = "shuffled"

    def __post_init__(self):
        super().__post_init__()
        _check_fixed(self.fixed_batch_size, self.population)

    @property
    def expected_batch_size(self) -> float:
        return float(self.fixed_batch_size)

    @property
    def physical_batch_size(self) -> int:
        return self._padded(self.fixed_batch_size)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.population // self.fixed_batch_size)

    def batch(self, step: int) -> Batch:
        """Rows of iteration ``step`` (int >= 0): shapes (physical_batch_size,)."""
        epoch, position = divmod(step, self.batches_per_epoch)
        order = np.argsort(self._bits(epoch, 0, self.population), kind="stable")
        start = position * self.fixed_batch_size
        chosen = order[start : start + self.fixed_batch_size].astype(np.int32)
        return self._batch(np.sort(chosen), self.physical_batch_size)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Event of one *epoch*: disjoint batches compose in parallel."""
        return dp_accounting.GaussianDpEvent(noise_multiplier)

    def num_events(self, iterations: int) -> int:
        """How many of `dp_event` so many iterations cost: the epochs begun."""
        return -(-iterations // self.batches_per_epoch)

    neighboring_relations: ClassVar = (
        NeighboringRelation.REPLACE_SPECIAL,
        NeighboringRelation.REPLACE_ONE,
    )


@dataclasses.dataclass(frozen=True)
class CyclicSampler(_Sampler):
    """Fixed groups take turns: each example returns after exactly ``num_groups`` iterations.

    The order is drawn once, from the key. For noise that is correlated over iterations, which needs
    to know when an example can return; no amplification by sampling is claimed.

    Guarantee:
      Each example is in one group, and takes part in no other group's iterations. Groups differ in
      size by at most one, and none exceeds ``fixed_batch_size``. Neighbouring relation:
      replace-special or replace-one; adding or removing one would change the groups.

    Source: Choquette-Choo et al. (2023), multi-epoch matrix factorization (fixed-epoch order).

    Example:
      >>> import jax
      >>> sampler = CyclicSampler(10, jax.random.key(0), fixed_batch_size=4)
      >>> sampler.num_groups, [(~sampler.batch(i).is_padding_example).sum() for i in range(3)]
      (3, [np.int64(4), np.int64(3), np.int64(3)])
      >>> bool((sampler.batch(1).indices == sampler.batch(4).indices).all())
      True
    """

    fixed_batch_size: int = 0
    name: ClassVar[str] = "cyclic"

    def __post_init__(self):
        super().__post_init__()
        _check_fixed(self.fixed_batch_size, self.population)

    @property
    def num_groups(self) -> int:
        return -(-self.population // self.fixed_batch_size)

    @property
    def expected_batch_size(self) -> float:
        return self.population / self.num_groups

    @property
    def physical_batch_size(self) -> int:
        return self._padded(-(-self.population // self.num_groups))

    def batch(self, step: int) -> Batch:
        """Rows of iteration ``step`` (int >= 0): shapes (physical_batch_size,)."""
        bits = self._bits(0, 0, self.population)
        return self._batch(_group(bits, step, self.num_groups), self.physical_batch_size)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Event of one *epoch* with independent noise: disjoint groups compose in parallel."""
        return dp_accounting.GaussianDpEvent(noise_multiplier)

    def num_events(self, iterations: int) -> int:
        """How many of `dp_event` so many iterations cost: one example's participations."""
        return -(-iterations // self.num_groups)

    neighboring_relations: ClassVar = (
        NeighboringRelation.REPLACE_SPECIAL,
        NeighboringRelation.REPLACE_ONE,
    )


@dataclasses.dataclass(frozen=True)
class CyclicPoissonSampler(_Sampler):
    """Fixed groups take turns; of the group whose turn it is, each example joins independently.

    Both: an example returns after ``num_groups`` iterations at the earliest, as banded noise of at
    most as many bands needs, and its being there is amplified by sampling within its group.

    Guarantee:
      Inclusion within the group is independent with probability at most ``sampling_probability``,
      and each example is in one fixed group. Neighbouring relation: replace-special; adding or
      removing one would change the groups. The realised batch size is private.

    Source: Choquette-Choo et al. (2023), "(Amplified) banded matrix factorization", algorithm 2 and
    theorem 4.

    Example:
      >>> import jax
      >>> sampler = CyclicPoissonSampler(
      ...     1000, jax.random.key(0), sampling_probability=0.4, num_groups=4)
      >>> 50 < (~sampler.batch(0).is_padding_example).sum() < 150  # 100 expected of 250
      np.True_
    """

    sampling_probability: float = 0.0
    num_groups: int = 1
    name: ClassVar[str] = "cyclic_poisson"

    def __post_init__(self):
        super().__post_init__()
        _check_probability(self.sampling_probability)
        if not 1 <= self.num_groups <= self.population:
            raise DpjaxError(
                f"num_groups is {self.num_groups}; it must be between 1 and the "
                f"{self.population} examples"
            )

    @property
    def expected_batch_size(self) -> float:
        return self.population * self.sampling_probability / self.num_groups

    @property
    def physical_batch_size(self) -> int:
        largest = -(-self.population // self.num_groups)
        tail = stats.binom.isf(_OVERFLOW_PROBABILITY, largest, self.sampling_probability)
        return self._padded(min(int(tail), largest))

    def batch(self, step: int) -> Batch:
        """Rows of iteration ``step`` (int >= 0): shapes (physical_batch_size,)."""
        # The order has a stream that no iteration draws from.
        group = _group(self._bits(0, 1, self.population), step, self.num_groups)
        chosen = _poisson_sample(self._bits(step, 0, len(group)), self.sampling_probability)
        physical = self.physical_batch_size
        while len(chosen) > physical:
            physical *= 2
        return self._batch(group[chosen], physical)

    def dp_event(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """Event of one round of all groups."""
        return dp_accounting.PoissonSampledDpEvent(
            self.sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)
        )

    def num_events(self, iterations: int) -> int:
        """How many of `dp_event` so many iterations cost: the turns of one example's group."""
        return -(-iterations // self.num_groups)

    neighboring_relations: ClassVar = (NeighboringRelation.REPLACE_SPECIAL,)


def _group(bits: np.ndarray, step: int, num_groups: int) -> np.ndarray:
    """The group of iteration ``step`` in an order drawn once: sorted int32 rows."""
    order = np.argsort(bits, kind="stable").astype(np.int32)
    return np.sort(np.array_split(order, num_groups)[step % num_groups])


Sampler: TypeAlias = (
    PoissonSampler
    | TruncatedPoissonSampler
    | FixedSizeSampler
    | ShuffledSampler
    | CyclicSampler
    | CyclicPoissonSampler
)

SAMPLERS: dict[str, type[Sampler]] = {
    kind.name: kind
    for kind in (
        PoissonSampler,
        TruncatedPoissonSampler,
        FixedSizeSampler,
        ShuffledSampler,
        CyclicSampler,
        CyclicPoissonSampler,
    )
}
"""Every sampler by its name, for configurations and ledgers."""


def composed_dp_event(
    sampler: Sampler, noise_multiplier: float, iterations: int
) -> dp_accounting.DpEvent:
    """Event of ``iterations`` iterations of this sampler with independent noise.

    Example:
      >>> import jax
      >>> sampler = ShuffledSampler(100, jax.random.key(0), fixed_batch_size=10)
      >>> composed_dp_event(sampler, 2.0, iterations=25)  # two and a half epochs cost three
      SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=2.0), count=3)
    """
    count = sampler.num_events(iterations)
    if count == 0:
        return dp_accounting.NoOpDpEvent()
    return dp_accounting.SelfComposedDpEvent(sampler.dp_event(noise_multiplier), count)


def _check_probability(value: float) -> None:
    if not 0 < value <= 1:
        raise DpjaxError(
            f"sampling_probability is {value}; it must be in (0, 1]: "
            "expected batch size / number of examples"
        )


def _check_fixed(size: int, population: int) -> None:
    if not 1 <= size <= population:
        raise DpjaxError(
            f"fixed_batch_size is {size}; it must be between 1 and the {population} examples"
        )
