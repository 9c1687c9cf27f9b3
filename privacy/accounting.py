"""What a list of releases costs in ε, at a given δ.

The ledger records *events*; this module judges them, by Google's dp-accounting. Neighbouring
data sets differ in one device's update being there or replaced by zeros, so these are
guarantees for a whole device, not for one of its examples.

Gaussians without sampling compose to one Gaussian with 1/z² = Σ 1/zᵢ², whose (ε, δ) curve has
a closed form (Balle and Wang, ICML 2018, theorem 8; Dong, Roth and Su 2022, corollary 3.3): it
is the limit that a privacy loss distribution approaches from above, at once and at any ε.
Sampled ones go through a privacy loss distribution on a grid that grows with ε, always
rounded to the pessimistic side. Rényi accounting is the cross-check: it must never be lower.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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

_FINEST: Final = 4e-4
_CELLS: Final = 5000
"""The grid's step is about ε/5000 and never finer than 4e-4: at most 1e-4 too much ε."""

_ORDERS: Final = RdpAccountant().orders


@dataclass(frozen=True, slots=True)
class Gaussian:
    """One release under Gaussian noise of ``noise_multiplier`` times the sensitivity.

    ``sampling`` is the probability with which each device was, independently and in secret,
    in the cohort (Poisson); none when the cohort was fixed or chosen in the open.
    """

    noise_multiplier: float
    sampling: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise BadParameters(f"noise_multiplier {self.noise_multiplier} must be positive")
        if self.sampling is not None and not 0 < self.sampling <= 1:
            raise BadParameters(f"sampling {self.sampling} must be a probability above 0")


@dataclass(frozen=True, slots=True)
class Unnoised:
    """One release without noise: no ε bounds it."""


Event = Gaussian | Unnoised


def to_json(event: Event) -> dict[str, object]:
    """Return the event as JSON-able data, the form in which ledgers keep it."""
    if isinstance(event, Unnoised):
        return {"kind": "unnoised"}
    return {
        "kind": "gaussian",
        "noise_multiplier": event.noise_multiplier,
        "sampling": event.sampling,
    }


def from_json(data: Mapping[str, object]) -> Event:
    """Read what :func:`to_json` wrote; raise :class:`BadParameters` for anything else."""
    kind, noise, sampling = data.get("kind"), data.get("noise_multiplier"), data.get("sampling")
    if kind == "unnoised":
        return Unnoised()
    if (
        kind != "gaussian"
        or not isinstance(noise, int | float)
        or not isinstance(sampling, int | float | None)
    ):
        raise BadParameters(f"not an event of a privacy ledger: {dict(data)!r}")
    return Gaussian(float(noise), None if sampling is None else float(sampling))


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent. ``epsilon_rdp`` is a looser bound on the same, for comparison.

    ``method`` says where ``epsilon_pld`` comes from; with ``"rdp"`` no finer bound could be
    computed and the two are equal.
    """

    epsilon_pld: float
    epsilon_rdp: float
    delta: float
    method: Method


def spent(events: Iterable[Event], delta: float) -> Spent:
    """Return what ``events`` cost together at ``delta``."""
    if not 0 < delta < 1:
        raise BadParameters(f"delta {delta} must be between 0 and 1")
    return _spent(frozenset(Counter(events).items()), delta)


@lru_cache(maxsize=256)
def _spent(counted: frozenset[tuple[Event, int]], delta: float) -> Spent:
    counts = dict(counted)
    if not counts:
        return Spent(0.0, 0.0, delta, "nothing spent")
    gaussians = {event: n for event, n in counts.items() if isinstance(event, Gaussian)}
    if len(gaussians) < len(counts):
        return Spent(math.inf, math.inf, delta, "unbounded")
    # The precision Σ n/z² of everything that was not sampled, as one Gaussian.
    sampled = {e: n for e, n in gaussians.items() if e.sampling not in {None, 1.0}}
    fixed = _precision({e: n for e, n in gaussians.items() if e not in sampled})
    epsilon_rdp = _rdp(fixed, sampled, delta)
    # Sampling never costs anything, so this bounds every case and is exact without it.
    best: tuple[float, Method] = (
        gaussian_epsilon(math.sqrt(_precision(gaussians)), delta),
        "closed form",
    )
    if sampled:
        best = min(best, (epsilon_rdp, "rdp"))
        best = min(best, (_pld(fixed, sampled, delta, best[0]), "pld"))
    return Spent(best[0], epsilon_rdp, delta, best[1])


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


def _rdp(fixed: float, sampled: Mapping[Gaussian, int], delta: float) -> float:
    total = np.asarray(_ORDERS) * fixed / 2  # a Gaussian's divergence at order α is α/2z²
    for event, count in sampled.items():
        total += count * _rdp_single(event)
    return float(compute_epsilon(_ORDERS, total, delta)[0])


@lru_cache(maxsize=32)
def _rdp_single(event: Gaussian) -> npt.NDArray[np.float64]:
    accountant = RdpAccountant(_ORDERS)
    inner = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    logger = logging.getLogger("absl")
    # It tells of every order it leaves out; leaving out orders only loosens the bound.
    logger.addFilter(_silence)
    try:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sampling, inner))
    finally:
        logger.removeFilter(_silence)
    return np.asarray(accountant.rdp, dtype=np.float64)


def _silence(record: logging.LogRecord) -> bool:
    return "failed to converge" not in record.getMessage()


def _pld(fixed: float, sampled: Mapping[Gaussian, int], delta: float, bound: float) -> float:
    """Return ε by privacy loss distribution; infinite when it cannot be computed.

    ``bound`` is a known upper bound on the result; it sets the grid.
    """
    if not 0 < bound < math.inf:
        return math.inf
    # Powers of two, so that the distributions of single events stay in the cache.
    step = _FINEST * 2.0 ** max(0, math.floor(math.log2(bound / _CELLS / _FINEST)))
    try:
        parts = [
            _single(e.noise_multiplier, e.sampling, step).self_compose(n)
            if n > 1
            else _single(e.noise_multiplier, e.sampling, step)
            for e, n in sampled.items()
        ]
        if fixed:
            parts.append(_single(1 / math.sqrt(fixed), None, step))
        whole = reduce(lambda left, right: left.compose(right), parts)
        epsilon = float(whole.get_epsilon_for_delta(delta))
    except (ArithmeticError, MemoryError, ValueError):
        return math.inf
    return epsilon if epsilon >= 0 else math.inf


@lru_cache(maxsize=32)
def _single(
    noise_multiplier: float, sampling: float | None, step: float
) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling or 1.0, value_discretization_interval=step
    )
