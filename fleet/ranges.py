"""How large a tensor's values get, from devices that never show one: mergeable histograms.

Static quantisation needs the range of every activation. Each device observes its own values
in bins of power-of-two width aligned at zero, so two histograms merge exactly: the finer one
is coarsened to the other's width by adding neighbouring bins. The width is the smallest that
keeps the values in :data:`MAX_BINS` bins, which makes the result of any number of merges the
same in any order and grouping, and the same as observing all values at once.

    observe(values) -> Histogram      merge(one, other) -> Histogram
    pack(histogram) -> bytes          unpack(data) -> Histogram
    thresholds(histogram, share) -> (low, high)

What a device reveals of its extremes is the bin they fall into, not their values.
"""

from dataclasses import dataclass
from math import frexp, ldexp
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.fleet.counts import MAX_COUNT, Counts, checked, pack_counts, unpack_counts
from atoll.fleet.errors import BadProfile

MAX_BINS: Final = 2048
MIN_EXPONENT: Final = -64
MAX_EXPONENT: Final = 128
_MANTISSA: Final = 24
"""Bins are never finer than float32 resolves at the largest value."""
_LARGEST: Final = float(np.finfo(np.float32).max)

Thresholds = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Bin ``i`` of ``counts``, int64 ``(bins,)``, holds values in ``[first + i, first + i + 1)``.

    The unit is ``2 ** exponent``. The first and the last bin are never empty. ``odd`` counts
    NaN and what is beyond float32. Without finite values ``counts`` is empty.
    """

    exponent: int
    first: int
    counts: Counts
    odd: int = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (
            (self.exponent, self.first, self.odd) == (other.exponent, other.first, other.odd)
        ) and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.exponent, self.first, self.odd, self.counts.tobytes()))

    @property
    def total(self) -> int:
        """How many finite values were observed."""
        return int(self.counts.sum())


EMPTY: Final = Histogram(MIN_EXPONENT, 0, np.zeros(0, np.int64))
"""What observing nothing gives; merging with it changes nothing."""


def observe(values: npt.NDArray[np.floating]) -> Histogram:
    """Count ``values`` of any shape and floating dtype; what float32 cannot hold is odd."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    finite = flat[np.abs(flat) <= _LARGEST]
    odd = flat.size - finite.size
    if not finite.size:
        return Histogram(EMPTY.exponent, 0, EMPTY.counts, odd)
    largest = float(np.abs(finite).max())
    # Zeros alone fit the finest bins; frexp(0) says nothing about them.
    exponent = max(frexp(largest)[1] - _MANTISSA, MIN_EXPONENT) if largest else MIN_EXPONENT
    index = np.floor(np.ldexp(finite, -exponent)).astype(np.int64)
    low, high = int(index.min()), int(index.max())
    shift = _shift(low, high)
    first = low >> shift
    counts = np.bincount((index >> shift) - first).astype(np.int64)
    return Histogram(exponent + shift, first, counts, odd)


def merge(one: Histogram, other: Histogram) -> Histogram:
    """Return the histogram of both; associative and commutative.

    Raises :class:`BadProfile` when a count leaves the range.
    """
    odd = one.odd + other.odd
    if not one.counts.size or not other.counts.size:
        full = one if one.counts.size else other
        return Histogram(full.exponent, full.first, full.counts, odd)
    exponent = max(one.exponent, other.exponent)
    sides = [(side, exponent - side.exponent) for side in (one, other)]
    low = min(side.first >> up for side, up in sides)
    high = max(side.first + side.counts.size - 1 >> up for side, up in sides)
    shift = _shift(low, high)
    first = low >> shift
    counts = np.zeros((high >> shift) - first + 1, np.int64)
    for side, up in sides:
        places = (np.arange(side.counts.size) + side.first >> up + shift) - first
        np.add.at(counts, places, side.counts)
    return Histogram(exponent + shift, first, checked(counts), odd)


def thresholds(histogram: Histogram, share: float = 1.0) -> Thresholds:
    """Return the narrowest ends of bins that hold at least ``share`` of the values.

    As many values may be cut off at one end as at the other: ``(1 - share) / 2`` of them.
    Raises :class:`BadProfile` when nothing finite was observed, or something that is not.
    """
    if histogram.odd or not histogram.counts.size:
        raise BadProfile("a tensor has NaN, infinite or no values; its range cannot be known")
    if not 0 < share <= 1:
        raise BadProfile(f"a share of {share} of the values is not between 0 and 1")
    cut = (1 - share) / 2 * histogram.total
    upto = np.cumsum(histogram.counts)
    low = int(np.searchsorted(upto, cut, side="right"))
    downto = np.cumsum(histogram.counts[::-1])
    high = histogram.counts.size - int(np.searchsorted(downto, cut, side="right"))
    unit = histogram.exponent
    return ldexp(histogram.first + low, unit), ldexp(histogram.first + high, unit)


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    exponent: int
    first: int
    odd: int
    counts: bytes


def pack(histogram: Histogram) -> bytes:
    """Return the histogram as MessagePack, its counts packed (:mod:`atoll.fleet.counts`)."""
    counts = pack_counts(histogram.counts) if histogram.counts.size else b""
    return msgspec.msgpack.encode(
        _Packed(histogram.exponent, histogram.first, histogram.odd, counts)
    )


def unpack(data: bytes) -> Histogram:
    """Read what :func:`pack` wrote; the bytes may come from anyone. Raises :class:`BadProfile`."""
    try:
        packed = msgspec.msgpack.decode(data, type=_Packed)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadProfile(f"not a histogram: {error}") from error
    if not MIN_EXPONENT <= packed.exponent <= MAX_EXPONENT or not 0 <= packed.odd <= MAX_COUNT:
        raise BadProfile("a histogram's unit or count of odd values is out of range")
    counts = unpack_counts(packed.counts) if packed.counts else EMPTY.counts
    if counts.size and (not counts[0] or not counts[-1] or counts.size > MAX_BINS):
        raise BadProfile("a histogram has bins that it cannot have")
    if abs(packed.first) > 1 << _MANTISSA or (not counts.size and packed.first):
        raise BadProfile("a histogram begins where no value can be")
    return Histogram(packed.exponent, packed.first, counts, packed.odd)


def _shift(low: int, high: int) -> int:
    """Return how often to halve the number of bins so that ``low`` to ``high`` fit."""
    shift = 0
    while (high >> shift) - (low >> shift) >= MAX_BINS:
        shift += 1
    return shift
