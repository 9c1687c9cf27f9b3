"""From a model update to the integers that a sum adds up, and back to their mean.

    refuse NaN and Inf → clip → scale → round stochastically → check the norm → add noise

Everything that the privacy of a device rests on happens on integers: the L2 norm of what
leaves :func:`quantise` is at most :attr:`UpdateSpec.sensitivity`, checked exactly after
rounding, and the noise is discrete. Neighbouring cohorts differ in one device's update being
replaced by zeros. After Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian
Mechanism for Federated Learning with Secure Aggregation" (ICML 2021).

:class:`Clipped` and :class:`Noised` are separate types, so that noising twice, or noising
what was never clipped, does not type-check.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.privacy import noise
from atoll.privacy.errors import BadParameters, BadUpdate
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers

Floats = npt.NDArray[np.float64]

MIN_SHARE_SIGMA: Final = 2.0
"""A sum of discrete Gaussians this wide is within 1e-15 of a discrete Gaussian (ibid., Thm 1)."""

MIN_BITS: Final = 2
MAX_BITS: Final = 24
_ATTEMPTS: Final = 32


@dataclass(frozen=True, slots=True)
class UpdateSpec:
    """How updates become integers; hub and devices must use the same.

    ``clip_norm`` is the largest L2 norm of an update, in the update's own unit; ``bits`` those
    of one quantised value, sign included; ``noise_multiplier`` σ of the noise on the *sum* over
    the sensitivity when ``survivors`` devices take part (it is larger when more do).

    Raises :class:`BadParameters` for values that cannot work.
    """

    clip_norm: float
    bits: int
    noise_multiplier: float
    survivors: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise BadParameters(f"clip_norm {self.clip_norm} must be positive and finite")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise BadParameters(f"bits {self.bits} must be {MIN_BITS} to {MAX_BITS}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise BadParameters(
                f"noise_multiplier {self.noise_multiplier} must be zero or positive, and finite"
            )
        if self.survivors < 1:
            raise BadParameters(f"survivors {self.survivors} must be at least 1")
        if self.noise_multiplier and self.share_sigma < MIN_SHARE_SIGMA:
            raise BadParameters(
                f"noise of σ = {self.share_sigma:.2g} integer steps per device is too coarse to "
                f"add up to a Gaussian; raise bits (now {self.bits}) until it is "
                f"{MIN_SHARE_SIGMA:g} or more"
            )
        if self.share_sigma > noise.MAX_SIGMA:
            raise BadParameters(
                f"noise of σ = {self.share_sigma:.2g} integer steps per device cannot be drawn; "
                "lower noise_multiplier or bits"
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
    def share_sigma(self) -> float:
        """Standard deviation of one device's noise, in integers."""
        return self.noise_multiplier * self.sensitivity / math.sqrt(self.survivors)

    @property
    def bound(self) -> int:
        """Largest |integer| of one term, noise included; a hard limit.

        Noise past 9.3 σ is drawn again (:func:`atoll.privacy.noise.tail`). Per value that
        happens with probability below 2**-61, which is also how far the noise is from the
        untruncated distribution: a million values, a thousand devices and a hundred rounds add
        less than 5e-8 to δ.
        """
        return self.sensitivity + (noise.tail(self.share_sigma) if self.noise_multiplier else 0)

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
                f"{self.bits} bits are too few for {length} values: rounding alone would fill "
                "the clipping norm; raise bits"
            )
        return room


@dataclass(frozen=True, slots=True)
class Clipped:
    """Integers whose L2 norm is at most the sensitivity."""

    values: Integers


@dataclass(frozen=True, slots=True)
class Noised:
    """Integers that carry this device's share of the noise."""

    values: Integers


def quantise(update: npt.ArrayLike, spec: UpdateSpec, rng: Keystream) -> Clipped:
    """Clip ``update`` (``(n,)``, any float) and round it to integers without bias.

    Raises :class:`BadUpdate` for NaN, Inf or another shape.
    """
    values = np.asarray(update, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise BadUpdate(f"an update has one axis and some values; this has shape {values.shape}")
    if not np.isfinite(values).all():
        raise BadUpdate("the update holds NaN or Inf; the device's training diverged")
    wanted = _scaled(values, spec)
    floor = np.floor(wanted)
    fraction = wanted - floor
    limit = spec.sensitivity**2
    for _ in range(_ATTEMPTS):
        rounded = (floor + (rng.uniform(values.size) < fraction)).astype(np.int64)
        if int(rounded @ rounded) <= limit:
            return Clipped(rounded)
    # Fewer than one update in a million comes here; rounding to zero never lengthens.
    return Clipped(np.trunc(wanted).astype(np.int64))


def _scaled(values: Floats, spec: UpdateSpec) -> Floats:
    """Return ``values`` in integer units, their norm at most ``spec.room``."""
    room = spec.room(values.size)
    largest = float(np.abs(values).max())
    if largest == 0.0:
        return values
    # Divided by the largest first: squares of huge or tiny values leave a float's range.
    direction = values / largest
    length = float(np.linalg.norm(direction))
    wanted = min(largest * spec.scale, room / length)
    return direction * wanted


def add_noise(clipped: Clipped, spec: UpdateSpec, rng: Keystream) -> Noised:
    """Add this device's share of the noise; none when the multiplier is zero."""
    if not spec.noise_multiplier:
        return Noised(clipped.values)
    drawn = noise.discrete_gaussian(spec.share_sigma, clipped.values.size, rng)
    return Noised(clipped.values + drawn)


def encode(update: npt.ArrayLike, spec: UpdateSpec, rng: Keystream) -> Integers:
    """Return the integers, int64 ``(n,)`` in ``[-bound, bound]``, that stand for ``update``.

    Clipped to ``clip_norm``, rounded and noised. ``rng`` is ``Keystream.fresh()`` wherever
    there is noise. Raises :class:`BadUpdate` for NaN, Inf or a shape other than ``(n,)``.
    """
    return add_noise(quantise(update, spec, rng), spec, rng).values


def decode(values: Integers, spec: UpdateSpec, survivors: int) -> Floats:
    """Return the mean update, float64 ``(n,)``, from the sum over ``survivors`` devices."""
    if survivors < 1:
        raise BadParameters("a mean needs at least one survivor")
    return values / (spec.scale * survivors)
