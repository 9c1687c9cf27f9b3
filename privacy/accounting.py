"""What a list of releases costs in ε, at a given δ.

The ledger records *events*; this module judges them, by Google's dp-accounting. Neighbouring
data sets differ in the contribution of one unit (a device, an example, a served row: the ledger
says which) being there or replaced by zeros. One unit changes a sum by at most the clipping
norm C, and noise multipliers are σ/C.

For secret cohorts of a fixed size the known bound is on *replacing* one unit's contribution by
any other, which changes a sum by up to 2C. One account has one relation: as soon as it holds
such an event, all of it is judged by replacement. That is the stronger promise of the two, as
zeros are one of the contributions to replace by.
There, a release without sampling costs what half its noise multiplier costs otherwise, exactly;
a Poisson-sampled one is counted as if it had not been sampled, because no accountant at hand
composes it with the others. That is too much, never too little.

Gaussians without sampling compose to one Gaussian with 1/z² = Σ 1/zᵢ², whose (ε, δ) curve has
a closed form (Balle and Wang, ICML 2018, theorem 8; Dong, Roth and Su 2022, corollary 3.3): it
is the limit that a privacy loss distribution approaches from above, at once and at any ε.
Poisson-sampled ones go through a privacy loss distribution on a grid that grows with ε, always
rounded to the pessimistic side. Rényi accounting is the cross-check: it must never be lower.
For cohorts of a fixed size it is the only bound there is (Wang, Balle and Kasiviswanathan,
AISTATS 2019, theorem 27).
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Final, Literal

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from atoll.privacy.errors import BadParameters

Method = Literal["nothing spent", "closed form", "pld", "rdp", "unbounded"]
Relation = Literal["zero-out", "replace-one"]
"""In what neighbouring data sets differ: one contribution is left out, or is another."""

_FINEST: Final = 4e-4
_CELLS: Final = 5000
"""The grid's step is about ε/5000 and never finer than 4e-4. What that gives away is below 1e-3 of
ε in series of up to a thousand releases; in a million it has been 6 %, on the safe side."""

_ORDERS: Final = RdpAccountant().orders


@dataclass(frozen=True, slots=True)
class FixedSample:
    """A cohort of exactly ``size`` of ``population`` units, each such subset as likely as another.

    Which one was drawn is secret; how many there are is not.
    """

    size: int
    population: int

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.population:
            raise BadParameters(
                f"a sample of {self.size} of {self.population} must have 1 to {self.population}"
            )


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Releases under Gaussian noise whose σ is ``noise_multiplier`` times the clipping norm.

    ``sampling`` is the probability with which each unit was, independently and in secret, in
    the cohort (Poisson), or a secret :class:`FixedSample`; none when everybody took part or the
    cohort was chosen in the open. ``times`` is how many such releases there were, each with
    noise and a cohort of its own.
    """

    noise_multiplier: float
    sampling: float | FixedSample | None = None
    times: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise BadParameters(f"noise_multiplier {self.noise_multiplier} must be positive")
        if isinstance(self.sampling, float | int) and not 0 < self.sampling <= 1:
            raise BadParameters(f"sampling {self.sampling} must be a probability above 0")
        if self.times < 1:
            raise BadParameters(f"times {self.times} must be at least 1")


@dataclass(frozen=True, slots=True)
class Unnoised:
    """One release without noise: no ε bounds it."""


Event = Gaussian | Unnoised


def to_json(event: Event) -> dict[str, object]:
    """Return the event as JSON-able data, the form in which ledgers keep it."""
    if isinstance(event, Unnoised):
        return {"kind": "unnoised"}
    sampling = event.sampling
    if isinstance(sampling, FixedSample):
        written: object = {"size": sampling.size, "population": sampling.population}
    else:
        written = sampling
    data = {
        "kind": "gaussian",
        "noise_multiplier": event.noise_multiplier,
        "sampling": written,
    }
    return data if event.times == 1 else data | {"times": event.times}


def from_json(data: Mapping[str, object]) -> Event:
    """Read what :func:`to_json` wrote; raise :class:`BadParameters` for anything else."""
    if data.get("kind") == "unnoised":
        return Unnoised()
    match data:
        case {"kind": "gaussian", "noise_multiplier": float() | int() as noise, **rest}:
            times = rest.get("times", 1)
            if isinstance(times, int):
                return Gaussian(float(noise), _sampling(rest.get("sampling")), times)
    raise BadParameters(f"not an event of a privacy ledger: {dict(data)!r}")


def _sampling(written: object) -> float | FixedSample | None:
    match written:
        case None:
            return None
        case float() | int():
            return float(written)
        case {"size": int() as size, "population": int() as population}:
            return FixedSample(size, population)
    raise BadParameters(f"not a sampling of a privacy ledger's event: {written!r}")


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent. ``epsilon_rdp`` is a looser bound on the same, for comparison.

    ``method`` says where ``epsilon_pld`` comes from; with ``"rdp"`` no finer bound could be
    computed and the two are equal. ``relation`` says between which data sets the bounds hold.
    """

    epsilon_pld: float
    epsilon_rdp: float
    delta: float
    method: Method
    relation: Relation = "zero-out"


def spent(events: Iterable[Event], delta: float) -> Spent:
    """Return what ``events`` cost together at ``delta``."""
    if not 0 < delta < 1:
        raise BadParameters(f"delta {delta} must be between 0 and 1")
    counted: Counter[Event] = Counter()
    for event in events:
        if isinstance(event, Gaussian) and event.times > 1:
            counted[replace(event, times=1)] += event.times
        else:
            counted[event] += 1
    return _spent(frozenset(counted.items()), delta)


@lru_cache(maxsize=256)
def _spent(counted: frozenset[tuple[Event, int]], delta: float) -> Spent:
    counts = dict(counted)
    if not counts:
        return Spent(0.0, 0.0, delta, "nothing spent")
    gaussians = {event: n for event, n in counts.items() if isinstance(event, Gaussian)}
    if len(gaussians) < len(counts):
        return Spent(math.inf, math.inf, delta, "unbounded")
    drawn = {e: n for e, n in gaussians.items() if isinstance(e.sampling, FixedSample)}
    if drawn:
        return _replaced(gaussians, drawn, delta)
    # The precision Σ n/z² of everything that was not sampled, as one Gaussian.
    sampled = {e: n for e, n in gaussians.items() if e.sampling not in {None, 1.0}}
    whole = _precision({e: n for e, n in gaussians.items() if e not in sampled})
    epsilon_rdp = _rdp(whole, sampled, delta)
    # Sampling never costs anything, so this bounds every case and is exact without it.
    best: tuple[float, Method] = (
        gaussian_epsilon(math.sqrt(_precision(gaussians)), delta),
        "closed form",
    )
    if sampled:
        best = min(best, (epsilon_rdp, "rdp"))
        best = min(best, (_pld(whole, sampled, delta, best[0]), "pld"))
    return Spent(best[0], epsilon_rdp, delta, best[1])


def _replaced(
    gaussians: Mapping[Gaussian, int], drawn: Mapping[Gaussian, int], delta: float
) -> Spent:
    """Judge by replacement: the sensitivity is 2C, so a precision is four times what it was."""
    whole = 4 * _precision({e: n for e, n in gaussians.items() if e not in drawn})
    epsilon_rdp = _rdp(whole, drawn, delta)
    unsampled = gaussian_epsilon(2 * math.sqrt(_precision(gaussians)), delta)
    if unsampled <= epsilon_rdp:
        return Spent(unsampled, epsilon_rdp, delta, "closed form", "replace-one")
    return Spent(epsilon_rdp, epsilon_rdp, delta, "rdp", "replace-one")


def _precision(events: Mapping[Gaussian, int]) -> float:
    inverses = ((1 / e.noise_multiplier, n) for e, n in events.items())
    return math.fsum(n * inverse * inverse for inverse, n in inverses)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return δ(ε) of Gaussian noise with ``mu`` = sensitivity/σ: Φ(μ/2-ε/μ) - e^ε·Φ(-μ/2-ε/μ).

    Written with the scaled tail e^(x²/2)·Φ(-x), so that nothing overflows at any ε.
    """
    a, b = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    if a >= 0:
        return math.erfc(-a / math.sqrt(2)) / 2 - math.exp(-a * a / 2) * _scaled_tail(b)
    return math.exp(-a * a / 2) * (_scaled_tail(-a) - _scaled_tail(b))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least ε with ``gaussian_delta(mu, ε)`` ≤ ``delta``, to a relative 1e-12."""
    if not math.isfinite(mu * mu):
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_delta(mu, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def _scaled_tail(x: float) -> float:
    """Return e^(x²/2)·Φ(-x) for x ≥ 0."""
    if x < 15:
        return math.exp(x * x / 2) * math.erfc(x / math.sqrt(2)) / 2
    term, total = 1.0, 1.0
    for k in range(1, 12):  # 1 - 1/x² + 3/x⁴ - …: below 1e-17 here
        term *= -(2 * k - 1) / (x * x)
        total += term
    return total / (x * math.sqrt(2 * math.pi))


def _rdp(whole: float, sampled: Mapping[Gaussian, int], delta: float) -> float:
    total = np.asarray(_ORDERS) * whole / 2  # a Gaussian's divergence at order α is α/2z²
    for event, count in sampled.items():
        total += count * _rdp_single(event)
    return float(compute_epsilon(_ORDERS, total, delta)[0])


@lru_cache(maxsize=32)
def _rdp_single(event: Gaussian) -> npt.NDArray[np.float64]:
    noise, sampling = event.noise_multiplier, event.sampling
    if isinstance(sampling, FixedSample):
        accountant = RdpAccountant(_ORDERS, dp_accounting.NeighboringRelation.REPLACE_ONE)
        release = dp_accounting.SampledWithoutReplacementDpEvent(
            sampling.population, sampling.size, dp_accounting.GaussianDpEvent(noise / 2)
        )
    else:
        accountant = RdpAccountant(_ORDERS)
        release = dp_accounting.PoissonSampledDpEvent(
            sampling, dp_accounting.GaussianDpEvent(noise)
        )
    logger = logging.getLogger("absl")
    # It tells of every order it leaves out; leaving out orders only loosens the bound.
    logger.addFilter(_silence)
    try:
        accountant.compose(release)
    finally:
        logger.removeFilter(_silence)
    return np.asarray(accountant.rdp, dtype=np.float64)


def _silence(record: logging.LogRecord) -> bool:
    return "failed to converge" not in record.getMessage()


def _pld(whole: float, sampled: Mapping[Gaussian, int], delta: float, bound: float) -> float:
    """Return ε by privacy loss distribution; infinite when it cannot be computed.

    ``bound`` is a known upper bound on the result; it sets the grid.
    """
    if not 0 < bound < math.inf:
        return math.inf
    # Powers of two, so that the distributions of single events stay in the cache.
    step = _FINEST * 2.0 ** max(0, math.floor(math.log2(bound / _CELLS / _FINEST)))
    try:
        parts = [
            _single(e, step).self_compose(n) if n > 1 else _single(e, step)
            for e, n in sampled.items()
        ]
        if whole:
            parts.append(_single(Gaussian(1 / math.sqrt(whole)), step))
        together = reduce(lambda left, right: left.compose(right), parts)
        with np.errstate(over="ignore"):  # where e^-ε is no number any more; infinite then
            epsilon = float(together.get_epsilon_for_delta(delta))
    except (ArithmeticError, MemoryError, ValueError):
        return math.inf
    return epsilon if epsilon >= 0 else math.inf


@lru_cache(maxsize=32)
def _single(event: Gaussian, step: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        event.noise_multiplier,
        sampling_prob=event.sampling or 1.0,
        value_discretization_interval=step,
    )
