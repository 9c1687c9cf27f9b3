"""From a model update to the integers that a sum adds up, and from their sum back to floats.

    device   encode:   refuse NaN and Inf → clip → weigh → scale → round stochastically
                       → check the norm → add a share of the noise (distributed)
    hub      release:  → add all of the noise (central)
             decode:   → the sums in their own units

Everything that the privacy of a device rests on happens on integers: the L2 norm of what
leaves :func:`quantise` is at most :attr:`UpdateSpec.sensitivity`, checked exactly after
rounding, and the noise is discrete. Neighbouring cohorts differ in one device's term being
replaced by zeros. After Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian
Mechanism for Federated Learning with Secure Aggregation" (ICML 2021).

Behind the update's values a term may carry *riders*: single numbers in [-1, 1], each with
noise of its own, that the same sum adds up. What they mean is the caller's business; that
each moves its coordinate by :attr:`UpdateSpec.rider_steps` at most is kept here. Independent
Gaussians in one release are one Gaussian: :attr:`UpdateSpec.multiplier`.

:class:`Clipped` and :class:`Noised` are separate types: noise goes on what is clipped and
bare, and only what is noised is decoded, so that noising twice (on the devices and again at
the hub), or not at all, does not type-check.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.privacy import noise
from atoll.privacy.errors import BadParameters, BadUpdate
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers

Floats = npt.NDArray[np.float64]

Placement = Literal["distributed", "central"]
"""Who adds the noise: every device a share of it, or the hub all of it to the sum."""

MIN_SHARE_SIGMA: Final = 2.0
"""A sum of discrete Gaussians this wide is within 1e-15 of a discrete Gaussian (ibid., Thm 1)."""

MIN_BITS: Final = 2
MAX_BITS: Final = 24
_ATTEMPTS: Final = 32
_BLOCK: Final = 1 << 13
"""Values that are worked on at a time; with all that is made of them they stay in the cache.

And below the 10,000 from which OpenBLAS shares a dot product out to its threads: handing over costs
more than the product, and where other work has the cores each block waits for a turn.
"""
_SQUARED: Final = (1e-150, 1e150)
"""Magnitudes whose squares are floats, and sums of squares too."""


@dataclass(frozen=True, slots=True)
class UpdateSpec:
    """How updates become integers; hub and devices must use the same.

    ``clip_norm`` is the largest L2 norm of an update, in the update's own unit; ``bits`` those
    of one quantised value, sign included; ``noise_multiplier`` σ of the noise on the *sum* over
    the sensitivity when ``survivors`` devices take part. With distributed noise it is larger
    when more do, and it counts ``colluders`` of them as adding none: devices that know their
    own share can subtract it, so a device is protected from up to so many others.

    ``riders`` numbers follow the update, each with σ of ``rider_noise_multiplier`` over its own
    sensitivity.

    Raises :class:`BadParameters` for values that cannot work.
    """

    clip_norm: float
    bits: int
    noise_multiplier: float
    survivors: int
    colluders: int = 0
    placement: Placement = "distributed"
    riders: int = 0
    rider_noise_multiplier: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise BadParameters(f"privacy.clip_norm = {self.clip_norm} must be positive and finite")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise BadParameters(f"privacy.bits = {self.bits} must be {MIN_BITS} to {MAX_BITS}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise BadParameters(
                f"privacy.noise_multiplier = {self.noise_multiplier} must be zero or positive, "
                "and finite"
            )
        if self.survivors < 1:
            raise BadParameters(f"survivors {self.survivors} must be at least 1")
        if not 0 <= self.colluders < self.survivors:
            raise BadParameters(
                f"privacy.colluders = {self.colluders} must be 0 or more and fewer than the "
                f"{self.survivors} devices that a sum has at least: somebody has to add noise"
            )
        if self.riders < 0:
            raise BadParameters(f"riders {self.riders} must not be negative")
        self._check_rider_noise()
        for sigma in (self.share_sigma, self.rider_sigma):
            self._check_drawn(sigma)

    def _check_rider_noise(self) -> None:
        ratio = self.rider_noise_multiplier
        if not (math.isfinite(ratio) and ratio >= 0):
            raise BadParameters(
                f"privacy.rider_noise_multiplier = {ratio} must be zero or positive, and finite"
            )
        if self.riders and bool(ratio) != bool(self.noise_multiplier):
            raise BadParameters(
                f"privacy.rider_noise_multiplier = {ratio:g} and privacy.noise_multiplier = "
                f"{self.noise_multiplier:g} must be both zero or both positive: they protect "
                "one release"
            )
        if self.riders and self.rider_steps < 1:
            raise BadParameters(
                f"privacy.rider_noise_multiplier = {ratio:g} leaves riders no step of their own; "
                f"lower it or raise privacy.bits (now {self.bits})"
            )

    def _check_drawn(self, sigma: float) -> None:
        if not sigma:
            return
        if sigma < MIN_SHARE_SIGMA:
            raise BadParameters(
                f"noise of σ = {sigma:.2g} integer steps a draw is too coarse to "
                f"add up to a Gaussian; raise privacy.bits (now {self.bits}) until it is "
                f"{MIN_SHARE_SIGMA:g} or more"
            )
        if sigma > noise.MAX_SIGMA:
            raise BadParameters(
                f"noise of σ = {sigma:.2g} integer steps a draw cannot be drawn; "
                "lower privacy.noise_multiplier or privacy.bits"
            )

    @property
    def sensitivity(self) -> int:
        """L2 norm that one device's integers never exceed; also the largest |integer|."""
        return (1 << (self.bits - 1)) - 1

    @property
    def scale(self) -> float:
        """Integers per unit of the update."""
        return self.sensitivity / self.clip_norm

    @property
    def adders(self) -> int:
        """How many draws of noise a sum holds at least that no colluder knows."""
        return 1 if self.placement == "central" else self.survivors - self.colluders

    @property
    def share_sigma(self) -> float:
        """Standard deviation of one draw of noise on a value of the update, in integers."""
        return self.noise_multiplier * self.sensitivity / math.sqrt(self.adders)

    @property
    def rider_steps(self) -> int:
        """Largest |integer| of a rider, which stands for 1.

        As fine as the update's values, unless the noise would then be wider than theirs: it
        never is, so riders cost a sum no bits.
        """
        if self.rider_noise_multiplier <= self.noise_multiplier:
            return self.sensitivity
        return int(self.sensitivity * (self.noise_multiplier / self.rider_noise_multiplier))

    @property
    def rider_sigma(self) -> float:
        """Standard deviation of one draw of noise on a rider, in integers; 0 without riders."""
        if not self.riders:
            return 0.0
        return self.rider_noise_multiplier * self.rider_steps / math.sqrt(self.adders)

    @property
    def multiplier(self) -> float:
        """Noise multiplier of the whole release, riders included; 0 when it has no noise.

        A term moves the update's part by its sensitivity and each rider by its own. Divided
        by their σ, these are one vector of L2 norm √(1/z² + Σ 1/zᵣ²), and the release one
        Gaussian of the inverse (Andrew et al., NeurIPS 2021, theorem 1, for one rider).
        """
        if not self.noise_multiplier:
            return 0.0
        precision = self.noise_multiplier**-2
        if self.riders:
            precision += self.riders * self.rider_noise_multiplier**-2
        return 1 / math.sqrt(precision)

    @property
    def bound(self) -> int:
        """Largest |integer| of one term, a device's noise included; a hard limit.

        Noise past 9.3 σ is drawn again (:func:`atoll.privacy.noise.tail`). Per value that
        happens with probability below 2**-61, which is also how far the noise is from the
        untruncated distribution: a million values, a thousand devices and a hundred rounds add
        less than 5e-8 to δ.
        """
        return self.sensitivity + (0 if self.placement == "central" else self.tail)

    @property
    def tail(self) -> int:
        """Largest magnitude of one draw of noise, on values and riders alike."""
        return noise.tail(self.share_sigma) if self.noise_multiplier else 0

    def room(self, length: int) -> float:
        """Return the norm, in integers, to which ``length`` values are clipped before rounding.

        A little below :attr:`sensitivity`, so that rounding passes the check afterwards with
        probability at least 1 - exp(-1/2): the c with c² + n/4 + c + √n/2 = sensitivity²
        (ibid., eq. 3). Raises :class:`BadParameters` when that would be less than half.
        """
        square = self.sensitivity**2 - length / 4 - math.sqrt(length) / 2 + 0.25
        room = math.sqrt(square) - 0.5 if square > 0 else 0.0
        if room < self.sensitivity / 2:
            raise BadParameters(
                f"privacy.bits = {self.bits} are too few for {length} values: rounding alone "
                "would fill the clipping norm; raise privacy.bits"
            )
        return room


@dataclass(frozen=True, slots=True)
class Clipped:
    """Integers without noise; one device's part in them is at most the sensitivity (L2).

    Its riders are at most :attr:`UpdateSpec.rider_steps` each. One term, or a sum of terms.
    """

    values: Integers


@dataclass(frozen=True, slots=True)
class Noised:
    """Integers with noise: a term with its device's share, or a sum with all of it."""

    values: Integers


class Sums(NamedTuple):
    """What a sum says: float64 ``(n,)`` weighed updates and float64 ``(riders,)``, added up."""

    update: Floats
    riders: Floats


def norm(update: npt.ArrayLike) -> float:
    """Return the L2 norm of ``update``, ``(n,)``; no square leaves a float's range on the way.

    NaN or infinite when a value is.
    """
    values = _floats(update)
    largest = _largest(values)
    if not 0 < largest < math.inf:
        return largest
    unit = _unit(largest)
    return unit * _length(values, unit)


def _floats(update: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
    """Return ``update`` as float32 if it is that already, and as float64 otherwise."""
    values = np.asarray(update)
    return values if values.dtype == np.float32 else values.astype(np.float64, copy=False)


def _largest(values: npt.NDArray[np.floating[Any]]) -> float:
    """Return the largest magnitude; NaN when there is one, 0 for no values."""
    if not values.size:
        return 0.0
    highest, lowest = float(values.max()), float(values.min())
    return highest if math.isnan(highest) else max(highest, -lowest)


def _unit(largest: float) -> float:
    """Return what values are divided by before they are squared: 1 nearly always."""
    return 1.0 if not largest or _SQUARED[0] < largest < _SQUARED[1] else largest


def _length(values: npt.NDArray[np.floating[Any]], unit: float) -> float:
    """Return the L2 norm of ``values / unit``."""
    square = 0.0
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        if unit != 1.0:
            block /= unit
        square += float(block @ block)
    return math.sqrt(square)


def quantise(
    update: npt.ArrayLike,
    spec: UpdateSpec,
    rng: Keystream,
    weight: float = 1.0,
    riders: Sequence[float] = (),
) -> Clipped:
    """Clip ``update`` (``(n,)``, any float), weigh it and round it to integers without bias.

    ``weight`` is in [0, 1], so that what is weighed is within the clipping norm still;
    ``riders`` are in [-1, 1] and stand behind the update, rounded in the same way.

    Raises :class:`BadUpdate` for NaN, Inf or another shape, and for a weight or riders that
    are not in their range or not as many as the spec says.
    """
    values = _floats(update)
    if values.ndim != 1 or values.size == 0:
        raise BadUpdate(f"an update has one axis and some values; this has shape {values.shape}")
    largest = _largest(values)
    if not math.isfinite(largest):
        raise BadUpdate("the update holds NaN or Inf; the device's training diverged")
    if not 0 <= weight <= 1:
        raise BadUpdate(f"weight {weight} is not in [0, 1]")
    unit = _unit(largest)
    if unit != 1.0:
        values = values / unit
    rounded = np.empty(values.size + spec.riders, np.int64)
    _round(values, weight * _factor(values, largest, spec), spec, rng, rounded[: values.size])
    rounded[values.size :] = _rider_integers(riders, spec, rng)
    return Clipped(rounded)


def weighed(
    term: Integers, weight: float, riders: int, spec: UpdateSpec, rng: Keystream
) -> Integers:
    """Return a bare term with its update times ``weight``, in [0, 1], and rounded without bias.

    The ``riders`` behind it stay as they are. The update's norm does not pass the sensitivity.
    At a weight of one the term is returned as it is.
    """
    if weight == 1:
        return term
    values, rounded = len(term) - riders, term.copy()
    _round(term[:values].astype(np.float64), weight, spec, rng, rounded[:values])
    return rounded


def _round(
    values: npt.NDArray[np.floating[Any]],
    factor: float,
    spec: UpdateSpec,
    rng: Keystream,
    rounded: Integers,
) -> None:
    """Put ``factor * values``, rounded without bias, in ``rounded``; its norm is bounded."""
    for _ in range(_ATTEMPTS):
        if _attempt(values, factor, rng, rounded) <= spec.sensitivity**2:
            return
    # Fewer than one update in a million comes here; rounding to zero never lengthens.
    rounded[:] = np.trunc(values.astype(np.float64) * factor)


def _attempt(
    values: npt.NDArray[np.floating[Any]], factor: float, rng: Keystream, rounded: Integers
) -> float:
    """Round once; return the square of the norm, exact where it is below 2**53.

    A value goes up with its fraction's probability, for it does when its fraction and a number
    uniform in [0, 1) come to one; but for less than 2**-29, by the grain of these numbers.
    """
    square = 0.0
    wanted, coins = np.empty((2, min(_BLOCK, values.size)))
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        some, drawn = wanted[: block.size], coins[: block.size]
        np.multiply(block, factor, out=some, dtype=np.float64)
        rng.fill(drawn)
        np.add(some, drawn, out=some)
        np.floor(some, out=some)
        square += float(some @ some)
        rounded[start : start + block.size] = some
    return square


def _rider_integers(riders: Sequence[float], spec: UpdateSpec, rng: Keystream) -> Integers:
    if len(riders) != spec.riders:
        raise BadUpdate(f"{len(riders)} riders where {spec.riders} ride")
    values = np.asarray(riders, dtype=np.float64)
    if not (np.abs(values) <= 1).all():
        raise BadUpdate("a rider is not in [-1, 1]")
    wanted = values * spec.rider_steps
    floor = np.floor(wanted)
    # A whole number has no fraction, so that the limits themselves are never passed.
    return (floor + (rng.uniform(values.size) < wanted - floor)).astype(np.int64)


def _factor(values: npt.NDArray[np.floating[Any]], largest: float, spec: UpdateSpec) -> float:
    """Return what makes ``values`` integers' size, their norm at most ``spec.room``.

    They have been divided by the unit of the ``largest`` of them.
    """
    room = spec.room(values.size)
    if largest == 0.0:
        return 0.0
    return min(_unit(largest) * spec.scale, room / _length(values, 1.0))


def clipped(update: npt.ArrayLike, spec: UpdateSpec) -> Floats:
    """Return ``update`` as its term has it before weight, rounding and noise, in its own unit."""
    values = np.asarray(update, dtype=np.float64)
    largest = _largest(values)
    unit = _unit(largest)
    return values / unit * (_factor(values / unit, largest, spec) / spec.scale)


def add_noise(clipped: Clipped, spec: UpdateSpec, rng: Keystream) -> Noised:
    """Add one draw of the noise: a device's share, or all of it when it is central.

    None when the multiplier is zero.
    """
    if not spec.noise_multiplier:
        return Noised(clipped.values)
    length = clipped.values.size - spec.riders
    drawn = noise.discrete_gaussian(spec.share_sigma, length, rng)
    if spec.riders:
        behind = noise.discrete_gaussian(spec.rider_sigma, spec.riders, rng)
        drawn = np.concatenate([drawn, behind])
    return Noised(clipped.values + drawn)


def encode(
    update: npt.ArrayLike,
    spec: UpdateSpec,
    rng: Keystream,
    weight: float = 1.0,
    riders: Sequence[float] = (),
) -> Integers:
    """Return a device's term: int64 ``(n + riders,)`` in ``[-bound, bound]``.

    The update clipped to ``clip_norm``, weighed and rounded, its riders behind it; noised
    unless the hub adds the noise. ``rng`` is ``Keystream.fresh()`` wherever there is noise.
    Raises :class:`BadUpdate` as :func:`quantise` does.
    """
    return noised(quantise(update, spec, rng, weight, riders), spec, rng)


def noised(clipped: Clipped, spec: UpdateSpec, rng: Keystream) -> Integers:
    """Return a device's term: with its share of the noise, unless the hub adds it."""
    if spec.placement == "central":
        return clipped.values
    return add_noise(clipped, spec, rng).values


def release(total: Integers, spec: UpdateSpec, rng: Keystream) -> Noised:
    """Return the sum of encoded terms with all of its noise, which central noise gets here.

    ``rng`` is ``Keystream.fresh()`` wherever there is noise.
    """
    if spec.placement == "central":
        return add_noise(Clipped(total), spec, rng)
    return Noised(total)


def decode(total: Noised, spec: UpdateSpec) -> Sums:
    """Return what a sum says, in the units in which the terms were given."""
    length = total.values.size - spec.riders
    return Sums(total.values[:length] / spec.scale, total.values[length:] / spec.rider_steps)
