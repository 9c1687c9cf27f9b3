"""What a series of rounds will cost, reckoned before anything runs.

A plan asks for a noise multiplier or for an ε; here one gives the other, with what the noise
does to the sum. The accountants judge exactly as they will judge the ledger's records
(:mod:`atoll.privacy.accounting`). Whether a run may claim its sampling is another matter: it must
hide who took part (:func:`atoll.federation.release.amplification`), or it is charged in full.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from atoll.privacy.accounting import (
    FixedSample,
    Gaussian,
    Method,
    Relation,
    gaussian_epsilon,
    spent,
)
from atoll.privacy.errors import BadParameters

Sampling = Literal["none", "poisson", "fixed"]
"""How cohorts come about: chosen in the open, or drawn in secret in one of two ways.

``poisson`` takes each device on its own, so ``cohort`` is the mean; ``fixed`` takes exactly so
many.
"""

POINTS: Final = 24
"""At most so many points of the curve are computed, and the first round's besides."""

_STEPS: Final = 9000
"""Numbers of four significant digits in a decade."""
_WEAKEST: Final = -9 * _STEPS
_STRONGEST: Final = 30 * _STEPS
_HALVING: Final = 2700  # of an index: about a factor of two in the noise


@dataclass(frozen=True, slots=True)
class Series:
    """Rounds alike: in each a cohort of a population gives one clipped, noised sum.

    ``cohort`` and ``population`` count devices; ``delta`` is the δ of the promise. Raises
    :class:`BadParameters` for what cannot be, or promises nothing.
    """

    population: int
    cohort: int
    rounds: int
    delta: float
    sampling: Sampling = "none"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BadParameters(f"rounds {self.rounds} must be at least 1")
        if self.population < 1:
            raise BadParameters(f"population {self.population} must be at least 1")
        if not 1 <= self.cohort <= self.population:
            raise BadParameters(
                f"cohort {self.cohort} must be between 1 and the population of {self.population}"
            )
        if not 0 < self.delta < 1 / self.population:
            raise BadParameters(
                f"delta {self.delta:g} must be above 0 and below 1/{self.population}, or laying "
                f"one device open would count as private; use {default_delta(self.population):g}"
            )

    def release(self, noise_multiplier: float, times: int) -> Gaussian:
        """Return the event of so many of the rounds."""
        drawn: float | FixedSample | None = None
        if self.sampling == "poisson":
            drawn = self.cohort / self.population
        elif self.sampling == "fixed":
            drawn = FixedSample(self.cohort, self.population)
        return Gaussian(noise_multiplier, drawn, times)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a series costs with a noise multiplier, and what the noise does.

    ``epsilon`` is the finest bound there is (``method`` says which, ``relation`` between which
    data sets it holds), ``epsilon_rdp`` Rényi's. ``curve`` holds ``(rounds, ε)``, from the first
    round to the last. ``mean_noise`` is the standard deviation of the noise on a cohort's mean,
    ``device_share`` that of what one device adds where devices make the noise themselves; both
    in clipping norms.
    """

    series: Series
    noise_multiplier: float
    epsilon: float
    epsilon_rdp: float
    method: Method
    relation: Relation
    curve: tuple[tuple[int, float], ...]
    mean_noise: float
    device_share: float


def default_delta(population: int) -> float:
    """Return a δ of a tenth of the chance to hit one device of the population blindly."""
    if population < 1:
        raise BadParameters(f"population {population} must be at least 1")
    return 1 / (10 * population)


def with_noise(series: Series, noise_multiplier: float) -> Forecast:
    """Return what the series costs; raise :class:`BadParameters` for noise that is none."""
    total = spent([series.release(noise_multiplier, series.rounds)], series.delta)
    after = {
        rounds: spent([series.release(noise_multiplier, rounds)], series.delta).epsilon_pld
        for rounds in _sample(series.rounds)
    }
    return Forecast(
        series=series,
        noise_multiplier=noise_multiplier,
        epsilon=total.epsilon_pld,
        epsilon_rdp=total.epsilon_rdp,
        method=total.method,
        relation=total.relation,
        curve=tuple(after.items()),
        mean_noise=noise_multiplier / series.cohort,
        device_share=noise_multiplier / math.sqrt(series.cohort),
    )


def within(series: Series, epsilon: float) -> Forecast:
    """Return the forecast with the least noise that keeps the series within ``epsilon``."""
    return with_noise(series, least_noise(series, epsilon))


def least_noise(series: Series, epsilon: float) -> float:
    """Return the least noise multiplier of four significant digits that keeps within ``epsilon``.

    The series is judged with the number that is returned, so rounding breaks no promise.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise BadParameters(f"epsilon {epsilon} must be positive and finite")
    # Sampling never costs anything, so the noise that does without it does with it. A fixed
    # sample is judged by replacement, at twice the sensitivity.
    sensitivity = math.sqrt(series.rounds) * (2 if series.sampling == "fixed" else 1)

    def saved(index: int) -> float:  # rises with the noise, as bisection needs it
        return -gaussian_epsilon(sensitivity / _noise(index), series.delta)

    enough = bisect_left(range(_WEAKEST, _STRONGEST), -epsilon, key=saved) + _WEAKEST

    def excess(index: int) -> float:
        cost = spent([series.release(_noise(index), series.rounds)], series.delta).epsilon_pld
        return math.log(max(cost, epsilon * 1e-3) / epsilon) if cost < math.inf else math.inf

    if series.sampling == "none" or series.cohort == series.population:
        while excess(enough) > 0:  # where the two roundings differ
            enough += 1
        return _noise(enough)
    step, little = _HALVING, enough - _HALVING
    while excess(little) <= 0 and little > _WEAKEST:
        enough, step = little, 2 * step
        little = max(enough - step, _WEAKEST)
    return _noise(_crossing(excess, little, enough))


def _noise(index: int) -> float:
    """Return the numbers of four significant digits in their order; the one at 0 is 1.000."""
    decade, step = divmod(index, _STEPS)
    return float(f"{1000 + step}e{decade - 3}")


def _crossing(excess: Callable[[int], float], low: int, high: int) -> int:
    """Return where ``excess``, falling, is 0 or less first: above ``low``, at most at ``high``.

    By the Illinois variant of false position, which asks for few values: each is an accountant's
    whole work.
    """
    at_low, at_high = excess(low), excess(high)
    kept = 0
    while high - low > 1:
        share = at_low / (at_low - at_high) if math.isfinite(at_low) and at_low > at_high else 0.5
        middle = min(max(round(low + share * (high - low)), low + 1), high - 1)
        value = excess(middle)
        if value > 0:
            low, at_low = middle, value
            at_high = at_high / 2 if kept == 1 else at_high
            kept = 1
        else:
            high, at_high = middle, value
            at_low = at_low / 2 if kept == -1 else at_low
            kept = -1
    return high


def _sample(rounds: int) -> list[int]:
    points = min(rounds, POINTS)
    return sorted({1, *(math.ceil(rounds * i / points) for i in range(1, points + 1))})
