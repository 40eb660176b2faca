"""One frozen configuration that couples clipping, noise, sampling and accounting.

This is the only file that joins the four. The accountant's event is built from the very sampler
and noise multiplier that training uses, so no guarantee is computed for a run that did not happen.
"""

import dataclasses
import math
from typing import Literal

import dp_accounting
import numpy as np
import optax

from dpjax import accounting
from dpjax import sampling as samplers
from dpjax.adaptive import AdaptiveClipping
from dpjax.clipping import ClippedGrad, Groups, Method, clipped_grad
from dpjax.correlated_noise import CorrelatedNoise, matrix_factorization_privatizer
from dpjax.errors import DpjaxError
from dpjax.noise import gaussian_privatizer
from dpjax.releases import num_events, released_dp_event
from dpjax.strategies import BandedToeplitz, BufferedToeplitz, Strategy, Tree
from dpjax.types import (
    LossFn,
    NeighboringRelation,
    PyTree,
    RandomKey,
    as_neighboring_relation,
    require_key,
)

Sampling = Literal[
    "poisson", "truncated_poisson", "fixed_size", "shuffled", "cyclic", "cyclic_poisson"
]


@dataclasses.dataclass(frozen=True)
class DPSGD:
    """Differentially private SGD: sample, clip, sum, add Gaussian noise.

    Give exactly one of ``noise_multiplier`` and (``target_epsilon``, ``target_delta``); from a
    target the noise multiplier is calibrated once, when it is first read.

    Attributes:
      l2_clip_norm: largest L2 norm of one example's gradient; ``inf`` only without noise.
      sampling_probability: of one example in one iteration, in (0, 1]. For "fixed_size" and
        "shuffled" the batch is ``round(sampling_probability * population)``, for "cyclic" at most
        that; for "cyclic_poisson" it is the mean over all iterations.
      iterations: noisy releases planned.
      noise_multiplier: stddev / sensitivity under ``neighboring_relation``; 0 is "no privacy".
      target_epsilon: nats.
      target_delta: in (0, 1).
      sampling: "poisson", "truncated_poisson", "fixed_size", "shuffled", "cyclic" (groups of fixed
        members take turns) or "cyclic_poisson" (of the group whose turn it is, a Poisson sample;
        with banded noise only, as many groups as bands).
      population: number of examples, taken as public; needed by all but "poisson".
      truncated_batch_size: for "truncated_poisson".
      normalize_by: public constant that divides the sum, e.g. the expected batch size.
      neighboring_relation: default: the sampler's own first one.
      microbatch_size: examples differentiated at once; None is the whole physical batch.
      clipping_method: "auto", "vmap" or "lazy"; see `clipped_grad`.
      clip_groups: which leaves are clipped together; ``groups`` of `clipped_grad`.
      stability_constant: automatic clipping instead; see `clipped_grad`.
      adaptive_clipping: lets the clip norm follow a quantile; ``l2_clip_norm`` is the first one.
      accountant: "rdp" or "pld", used to calibrate.
      correlated_noise: noise that later iterations partly take back, in place of independent noise:
        `CorrelatedNoise`, or a ready strategy from `dpjax.strategies` (as ``strategy`` gives it).
        With "cyclic" sampling, or banded with "cyclic_poisson".

    Raises:
      DpjaxError: contradictory or impossible settings.

    Guarantee:
      ``dp_event`` describes what ``sampler`` and ``privatizer`` do, iteration by iteration, under
      ``neighboring_relation``; a relation for which the sampler's amplification is not proven is
      refused. The unit of privacy is one row of the data set. With correlated noise and "cyclic"
      sampling all iterations together are ONE Gaussian release with ``noise_multiplier``, and so
      is every beginning of them; the noise covers an example that returns in every turn of its
      group until the last planned iteration.

    Source: Abadi et al. (2016); Ponomareva et al. (2023) for the choices; Choquette-Choo et al.
    (2023) for correlated noise.

    Example:
      >>> mechanism = DPSGD(1.0, 0.04, 2250, noise_multiplier=1.5)
      >>> print(f"{mechanism.epsilon(1e-5):.3f}")
      7.329
      >>> calibrated = DPSGD(1.0, 0.04, 2250, target_epsilon=7.33, target_delta=1e-5)
      >>> print(f"{calibrated.noise_multiplier:.2f}")
      1.50
      >>> correlated = DPSGD(1.0, 0.04, 75, noise_multiplier=1.5, sampling="cyclic",
      ...                    population=1000, correlated_noise=CorrelatedNoise("banded"))
      >>> correlated.dp_event  # three epochs, one event
      GaussianDpEvent(noise_multiplier=1.5)
    """

    l2_clip_norm: float
    sampling_probability: float
    iterations: int
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    target_delta: float | None = None
    sampling: Sampling = "poisson"
    population: int | None = None
    truncated_batch_size: int | None = None
    normalize_by: float = 1.0
    neighboring_relation: NeighboringRelation | str | None = None
    microbatch_size: int | None = None
    clipping_method: Method = "auto"
    clip_groups: Groups = None
    stability_constant: float | None = None
    adaptive_clipping: AdaptiveClipping | None = None
    accountant: accounting.Accountant = "rdp"
    correlated_noise: CorrelatedNoise | Strategy | None = None

    def __post_init__(self):
        if self.sampling not in samplers.SAMPLERS:
            known = ", ".join(samplers.SAMPLERS)
            raise DpjaxError(f"sampling is {self.sampling!r}; use one of: {known}")
        if self.iterations < 1:
            raise DpjaxError(f"iterations is {self.iterations}; it must be at least 1")
        by_target = self.target_epsilon is not None or self.target_delta is not None
        if (self.noise_multiplier is None) != by_target:
            raise DpjaxError(
                f"noise_multiplier is {self.noise_multiplier}, target_epsilon is "
                f"{self.target_epsilon}, target_delta is {self.target_delta}; give either the noise"
                " multiplier or both targets"
            )
        proven = samplers.SAMPLERS[self.sampling].neighboring_relations
        relation = self.neighboring_relation
        relation = proven[0] if relation is None else as_neighboring_relation(relation)
        if relation not in proven:
            names = ", ".join(r.name.lower() for r in proven)
            raise DpjaxError(
                f"neighboring_relation is {relation.name.lower()}, for which {self.sampling} "
                f"sampling has no proven accounting; use one of: {names}"
            )
        object.__setattr__(self, "neighboring_relation", relation)
        if self.sampling != "poisson" and self.population is None:
            raise DpjaxError(
                f"population is None; {self.sampling} sampling needs it, e.g. len(data)"
            )
        if (self.sampling == "truncated_poisson") != (self.truncated_batch_size is not None):
            raise DpjaxError(
                f"truncated_batch_size is {self.truncated_batch_size} with {self.sampling} "
                "sampling; it belongs to truncated_poisson, and only there"
            )
        if by_target:
            if self.target_epsilon is None or self.target_delta is None:
                missing = "target_epsilon" if self.target_epsilon is None else "target_delta"
                raise DpjaxError(
                    f"{missing} is missing; a budget is (target_epsilon, target_delta)"
                )
            accounting.check_epsilon(self.target_epsilon)
            accounting.check_delta(self.target_delta, self.population)
        if self.adaptive_clipping is not None:
            self._check_adaptive_clipping()
        self._check_correlated_noise()
        # Building the parts once checks the remaining fields where they are understood.
        self._sampler(self.population or 1, None)
        self.clipped_grad(_no_loss)
        if self.strategy is not None and self.strategy.iterations != self.iterations:
            raise DpjaxError(
                f"the strategy is for {self.strategy.iterations} iterations, the mechanism for "
                f"{self.iterations}; they must be the same"
            )
        _ = self.strategy_sensitivity  # refuses a strategy that returning examples could escape
        if by_target:
            object.__setattr__(self, "noise_multiplier", self._calibrated_noise_multiplier())
        if not (self._noise >= 0 and math.isfinite(self._noise)):
            raise DpjaxError(f"noise_multiplier is {self._noise}; it must be finite and at least 0")
        if self._noise > 0 and not math.isfinite(self.l2_clip_norm):
            raise DpjaxError(
                f"l2_clip_norm is inf with noise_multiplier {self._noise:g}: no noise covers an "
                "unbounded gradient; use e.g. 1.0"
            )

    def _check_adaptive_clipping(self) -> None:
        if self.stability_constant is not None:
            raise DpjaxError(
                f"stability_constant is {self.stability_constant} with adaptive_clipping; "
                "automatic clipping has no threshold to move: use one of the two"
            )
        if self.population is None:
            raise DpjaxError(
                "population is None; adaptive_clipping divides by the expected batch size: "
                "give it, e.g. len(data)"
            )
        if not math.isfinite(self.l2_clip_norm):
            raise DpjaxError(
                f"l2_clip_norm is {self.l2_clip_norm}; adaptive_clipping starts there: use e.g. 1.0"
            )

    def _check_correlated_noise(self) -> None:
        given = self.correlated_noise
        if given is None:
            if self.sampling == "cyclic_poisson":
                raise DpjaxError(
                    "correlated_noise is None; cyclic_poisson sampling has as many groups as banded"
                    " noise has bands: give it, or use poisson sampling"
                )
            return
        if not isinstance(given, CorrelatedNoise | BandedToeplitz | BufferedToeplitz | Tree):
            raise DpjaxError(
                f"correlated_noise is a {type(given).__name__}; use CorrelatedNoise, or a banded, "
                "buffered or tree strategy"
            )
        if self.sampling not in ("cyclic", "cyclic_poisson"):
            raise DpjaxError(
                f"correlated_noise is given with {self.sampling} sampling, where an example may "
                "return in the next iteration and as often as chance has it, which no strategy's "
                "sensitivity covers; use cyclic sampling"
            )
        if self.adaptive_clipping is not None:
            raise DpjaxError(
                "adaptive_clipping is given with correlated_noise, for which its joint guarantee "
                "is not proven; use a fixed clip norm"
            )
        if self.sampling == "cyclic_poisson" and self._num_bands is None:
            raise DpjaxError(
                "cyclic_poisson sampling amplifies banded noise only: under any other, an example's"
                " turns overlap; use CorrelatedNoise('banded', num_bands=...) or cyclic sampling"
            )

    @property
    def _num_bands(self) -> int | None:
        """Of banded noise where the configuration says how many."""
        return getattr(self.correlated_noise, "num_bands", None)

    @property
    def strategy(self) -> Strategy | None:
        """Strategy matrix of the noise; None for independent noise."""
        if not isinstance(self.correlated_noise, CorrelatedNoise):
            return self.correlated_noise
        sampler = self._sampler(self.population or 1, None)
        assert isinstance(sampler, samplers.CyclicSampler | samplers.CyclicPoissonSampler)
        turns = sampler.num_events(self.iterations)
        return self.correlated_noise.strategy(self.iterations, sampler.num_groups, turns)

    @property
    def strategy_sensitivity(self) -> float:
        """How far one example's parts of norm 1 move all iterations together; 1 if independent.

        With "cyclic_poisson" it is that of one turn: the accountant composes the turns.
        """
        strategy = self.strategy
        if strategy is None:
            return 1.0
        sampler = self._sampler(self.population or 1, None)
        if isinstance(sampler, samplers.CyclicSampler):
            return strategy.sensitivity(sampler.num_groups, fixed_order=True)
        return strategy.sensitivity(self.iterations, max_participations=1)

    @property
    def _noise(self) -> float:
        assert self.noise_multiplier is not None
        return self.noise_multiplier

    @property
    def relation(self) -> NeighboringRelation:
        """``neighboring_relation`` with the sampler's default filled in."""
        assert isinstance(self.neighboring_relation, NeighboringRelation)
        return self.neighboring_relation

    def _calibrated_noise_multiplier(self) -> float:
        assert self.target_epsilon is not None and self.target_delta is not None
        return accounting.calibrate_noise_multiplier(
            lambda noise_multiplier: self._event(noise_multiplier, self.iterations),
            self.target_epsilon,
            self.target_delta,
            self.accountant,
            self.relation,
        )

    def _sampler(self, population: int, key: RandomKey | None) -> samplers.Sampler:
        if self.sampling == "poisson":
            return samplers.PoissonSampler(
                population,
                key,
                self.microbatch_size or 1,
                sampling_probability=self.sampling_probability,
            )
        if self.sampling == "truncated_poisson":
            return samplers.TruncatedPoissonSampler(
                population,
                key,
                self.microbatch_size or 1,
                sampling_probability=self.sampling_probability,
                truncated_batch_size=self.truncated_batch_size or 0,
            )
        if self.sampling == "cyclic_poisson":
            num_groups = self._num_bands or 1
            within = self.sampling_probability * num_groups
            within = 1.0 if 1 < within <= 1 + 1e-9 else within
            if self.sampling_probability <= 1 < within:
                raise DpjaxError(
                    f"num_bands is {num_groups} at sampling_probability "
                    f"{self.sampling_probability:g}: each of as many groups is smaller than the "
                    f"expected batch; use at most {int(1 / self.sampling_probability)} bands"
                )
            return samplers.CyclicPoissonSampler(
                population,
                key,
                self.microbatch_size or 1,
                sampling_probability=within,
                num_groups=num_groups,
            )
        kinds = {"shuffled": samplers.ShuffledSampler, "cyclic": samplers.CyclicSampler}
        kind = kinds.get(self.sampling, samplers.FixedSizeSampler)
        size = max(1, round(self.sampling_probability * population))
        return kind(population, key, self.microbatch_size or 1, fixed_batch_size=size)

    def _event(self, noise_multiplier: float, iterations: int) -> dp_accounting.DpEvent:
        described = self._sampler(self.population or 1, None)
        return released_dp_event(described, noise_multiplier, iterations, self.strategy)

    @property
    def dp_event(self) -> dp_accounting.DpEvent:
        """dp_accounting event of all planned iterations."""
        return self.dp_event_after(self.iterations)

    def dp_event_after(self, iterations: int) -> dp_accounting.DpEvent:
        """dp_accounting event of the first ``iterations`` iterations."""
        return self._event(self._noise, iterations)

    def dp_event_with(self, noise_multiplier: float) -> dp_accounting.DpEvent:
        """dp_accounting event of the same plan with another noise multiplier."""
        return self._event(noise_multiplier, self.iterations)

    @property
    def is_private(self) -> bool:
        """Whether any guarantee is claimed at all."""
        return self._noise > 0

    @property
    def gradient_noise_multiplier(self) -> float:
        """Of the gradient's own noise: above ``noise_multiplier`` where a count has its share."""
        if self.adaptive_clipping is None:
            return self._noise
        return self.adaptive_clipping.gradient_noise_multiplier(self._noise)

    @property
    def stddev(self) -> float:
        """Absolute noise standard deviation per coordinate of the (normalised) sum.

        With ``adaptive_clipping`` it is that of the first iteration, and moves with the clip norm.
        With ``correlated_noise`` it is that of the independent draws which the noise is made of.
        """
        if not self.is_private:
            return 0.0
        sensitivity = self.clipped_grad(_no_loss).sensitivity(self.relation)
        return self.gradient_noise_multiplier * self.strategy_sensitivity * sensitivity

    @property
    def count_stddev(self) -> float:
        """Absolute noise standard deviation of the count that `AdaptiveClipping` releases."""
        if self.adaptive_clipping is None:
            return 0.0
        return self.adaptive_clipping.count_stddev(self._noise, self.relation)

    @property
    def expected_batch_size(self) -> float:
        """Examples in a batch on average; public. Needs ``population``."""
        assert self.population is not None
        return float(self._sampler(self.population, None).expected_batch_size)

    def epsilon(
        self,
        delta: float,
        accountant: accounting.Accountant = "rdp",
        iterations: int | None = None,
    ) -> float:
        """Epsilon of ``iterations`` (default: all planned) at ``delta``, in nats."""
        planned = self.iterations if iterations is None else iterations
        accounting.check_delta(delta, self.population)
        return accounting.epsilon(self.dp_event_after(planned), delta, accountant, self.relation)

    def epsilon_curve(self, delta: float) -> np.ndarray:
        """RDP epsilon after 0, 1, ..., ``iterations`` iterations: float64[iterations + 1]."""
        counts = np.arange(self.iterations + 1)
        if not self.is_private:
            return np.where(counts > 0, np.inf, 0.0)
        described = self._sampler(self.population or 1, None)
        strategy = self.strategy
        counts = np.array([num_events(described, int(count), strategy) for count in counts])
        unique, inverse = np.unique(counts, return_inverse=True)
        curve = accounting.epsilon_curve(
            described.dp_event(self._noise), unique, delta, self.relation
        )
        return curve[inverse]

    def sampler(self, population: int, key: RandomKey) -> samplers.Sampler:
        """The sampler that this mechanism accounts for, over ``population`` examples."""
        self._check_population(population)
        return self._sampler(population, require_key(key))

    def _check_population(self, population: int) -> None:
        if self.population is not None and population != self.population:
            raise DpjaxError(
                f"the data set has {population} examples, but the mechanism was accounted for "
                f"population {self.population}; build it with population=len(dataset)"
            )

    def planned_sampler(self, population: int) -> samplers.Sampler:
        """The same sampler without a key: good for accounting, not for drawing."""
        return self._sampler(population, None)

    def check_sampler(self, sampler: samplers.Sampler) -> None:
        """Refuses a sampler other than the one whose epsilon this mechanism states.

        Example:
          >>> from dpjax.sampling import ShuffledSampler
          >>> mechanism = DPSGD(1.0, 0.1, 100, noise_multiplier=1.0)
          >>> mechanism.check_sampler(ShuffledSampler(1000, fixed_batch_size=100))
          Traceback (most recent call last):
          ...
          dpjax.errors.DpjaxError: the sampler is shuffled, but the mechanism accounts for poisson \
sampling; a poisson epsilon does not hold for it: build the mechanism with sampling='shuffled'
        """
        if sampler.name != self.sampling:
            raise DpjaxError(
                f"the sampler is {sampler.name}, but the mechanism accounts for {self.sampling} "
                f"sampling; a {self.sampling} epsilon does not hold for it: "
                f"build the mechanism with sampling={sampler.name!r}"
            )
        self._check_population(sampler.population)
        # Not only the event: two samplers with one event may return to an example at other times.
        expected = self._sampler(sampler.population, None)
        found = dataclasses.replace(sampler, key=None, multiple_of=expected.multiple_of)
        if found != expected:
            raise DpjaxError(
                f"the sampler is {found}, but the mechanism accounts for {expected}; "
                "take the sampler from mechanism.sampler(population, key)"
            )

    def clipped_grad(self, loss_fn: LossFn, has_aux: bool = False) -> ClippedGrad:
        """`dpjax.clipped_grad` with this mechanism's norm, normaliser and microbatch."""
        return clipped_grad(
            loss_fn,
            self.l2_clip_norm,
            method=self.clipping_method,
            microbatch_size=self.microbatch_size,
            has_aux=has_aux,
            normalize_by=self.normalize_by,
            groups=self.clip_groups,
            stability_constant=self.stability_constant,
        )

    def privatizer(self, key: RandomKey) -> optax.GradientTransformation:
        """Gaussian noise scaled to the clipped gradient's own sensitivity."""
        strategy = self.strategy
        if strategy is None:
            return gaussian_privatizer(self.stddev, key)
        return matrix_factorization_privatizer(strategy, self.stddev, key)


def _no_loss(params: PyTree, example: PyTree) -> PyTree:
    """Stands in where only the sensitivity of clipping is asked for."""
    del example
    return params
