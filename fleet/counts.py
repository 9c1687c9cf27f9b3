"""Bin counts: packed for the wire, unpacked with suspicion, merged exactly.

A count vector is int64 of shape ``(bins,)``, non-negative unless noise was added to it. Counts
are additive, so merging is addition and any grouping of devices and windows gives the same sum.

Packed form: unsigned LEB128 integers (DWARF 5, §7.6). First the number of bins; then for every
bin that is not zero, in order, how many zero bins come before it and its count. Most windows
fill few bins, so they pack into some two bytes per filled bin.

Signed form, for counts with noise: a zero, where the other form has its number of bins; the
number of bins; then every count, mapped to 0, -1, 1, -2, … ↦ 0, 1, 2, 3, … (Protocol Buffers'
ZigZag). Noise leaves few bins at zero, so none is left out. A reader that knows the first form
alone refuses the second, as one of no bins, and so never takes noised counts for exact ones;
one that knows both is told by the message which to expect, and refuses the other.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.fleet.errors import BadProfile

Counts = npt.NDArray[np.int64]

MAX_BINS: Final = 1 << 16
MAX_COUNT: Final = 1 << 53
"""Largest size of a count: exact as a float and far from overflow in any sum of sums."""

_MAX_VARINT_BYTES: Final = 8
_CONTINUES: Final = 0x80


def pack_counts(counts: Counts) -> bytes:
    """Pack one count vector; raise :class:`BadProfile` for one that is none."""
    counts = checked(counts)
    out = bytearray(_varint(counts.size))
    before = 0
    for index in np.flatnonzero(counts).tolist():
        out += _varint(index - before)
        out += _varint(int(counts[index]))
        before = index + 1
    return bytes(out)


def unpack_counts(data: bytes, bins: int | None = None) -> Counts:
    """Unpack what :func:`pack_counts` packed; the bytes may come from anyone.

    Raises :class:`BadProfile` unless ``data`` is the one packing of a vector of ``bins`` bins
    (any number of them up to :data:`MAX_BINS` when none is given).
    """
    numbers = _varints(data)
    size = _size(next(numbers, 0), bins)
    counts = np.zeros(size, dtype=np.int64)
    at = 0
    for gap in numbers:
        value = next(numbers, 0)
        at += gap
        if at >= size or not 0 < value <= MAX_COUNT:
            raise BadProfile("packed counts are malformed")
        counts[at] = value
        at += 1
    return counts


def pack_signed(counts: Counts) -> bytes:
    """Pack one vector of counts with noise; raise :class:`BadProfile` for one that is none."""
    counts = bounded(counts)
    out = bytearray(b"\x00")
    out += _varint(counts.size)
    for value in ((counts << 1) ^ (counts >> 63)).tolist():
        out += _varint(value)
    return bytes(out)


def unpack_signed(data: bytes, bins: int | None = None) -> Counts:
    """Unpack what :func:`pack_signed` packed; the bytes may come from anyone.

    Raises :class:`BadProfile` unless ``data`` is the one signed packing of a vector of ``bins``
    bins (any number of them up to :data:`MAX_BINS` when none is given).
    """
    numbers = _varints(data)
    if next(numbers, None) != 0:
        raise BadProfile("packed counts have no noise where the message says that they do")
    size = _size(next(numbers, 0), bins)
    values = list(islice(numbers, size + 1))
    if len(values) != size or max(values) > 2 * MAX_COUNT:
        raise BadProfile("packed counts are malformed")
    zigzag = np.array(values, dtype=np.int64)
    return np.asarray((zigzag >> 1) ^ -(zigzag & 1), dtype=np.int64)


def merge(one: Mapping[str, Counts], other: Mapping[str, Counts]) -> dict[str, Counts]:
    """Add two sets of count vectors by variable; one that only one side has is kept as it is.

    Associative and commutative. Raises :class:`BadProfile` when the bins of a variable differ
    in number or a sum leaves the range.
    """
    merged = {name: bounded(counts) for name, counts in one.items()}
    for name, counts in other.items():
        if name not in merged:
            merged[name] = bounded(counts)
        elif merged[name].shape != counts.shape:
            raise BadProfile(
                f"{name} has {merged[name].size} bins here and {counts.size} there; "
                "counts of different profiles cannot be merged"
            )
        else:
            merged[name] = bounded(merged[name] + bounded(counts))
    return merged


def pack_all(counts: Mapping[str, Counts]) -> dict[str, bytes]:
    """Pack every vector of a set."""
    return {name: pack_counts(vector) for name, vector in counts.items()}


def pack_all_signed(counts: Mapping[str, Counts]) -> dict[str, bytes]:
    """Pack every vector of a set of counts with noise."""
    return {name: pack_signed(vector) for name, vector in counts.items()}


def unpack_all(
    packed: Mapping[str, bytes], bins: Mapping[str, int] | None = None
) -> dict[str, Counts]:
    """Unpack every vector of a set.

    With ``bins`` (variable → number of bins) exactly these variables must be there. Raises
    :class:`BadProfile`.
    """
    if bins is None:
        return {name: unpack_counts(data) for name, data in packed.items()}
    _complete(packed, bins)
    return {name: unpack_counts(data, bins[name]) for name, data in packed.items()}


def unpack_all_signed(packed: Mapping[str, bytes], bins: Mapping[str, int]) -> dict[str, Counts]:
    """Unpack every vector of a set of counts with noise; raises :class:`BadProfile`.

    Exactly the variables of ``bins`` (variable → number of bins) must be there.
    """
    _complete(packed, bins)
    return {name: unpack_signed(data, bins[name]) for name, data in packed.items()}


def checked(counts: Counts) -> Counts:
    """Return ``counts``; raise :class:`BadProfile` unless they are counts without noise."""
    if bounded(counts).min() < 0:
        raise BadProfile(f"a count must be between 0 and {MAX_COUNT}")
    return counts


def bounded(counts: Counts) -> Counts:
    """Return ``counts``; raise :class:`BadProfile` unless they are counts, noised or not."""
    if counts.ndim != 1 or not 0 < counts.size <= MAX_BINS or counts.dtype != np.int64:
        raise BadProfile(
            f"counts must be int64 of shape (bins,), not {counts.dtype} of {counts.shape}"
        )
    if counts.min() < -MAX_COUNT or counts.max() > MAX_COUNT:
        raise BadProfile(f"a count must be between -{MAX_COUNT} and {MAX_COUNT}")
    return counts


def _size(size: int, bins: int | None) -> int:
    if not 0 < size <= MAX_BINS or (bins is not None and size != bins):
        expected = f"{bins}" if bins is not None else f"1 to {MAX_BINS}"
        raise BadProfile(f"packed counts have {size} bins; expected {expected}")
    return size


def _complete(packed: Mapping[str, bytes], bins: Mapping[str, int]) -> None:
    if packed.keys() != bins.keys():
        odd = ", ".join(sorted(packed.keys() ^ bins.keys()))
        raise BadProfile(f"counts and profile disagree about the variables: {odd}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= _CONTINUES:
        out.append(value & 0x7F | _CONTINUES)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte & _CONTINUES:
            if shift >= 7 * _MAX_VARINT_BYTES:
                raise BadProfile("packed counts hold a number that is too long")
        elif byte == 0 and shift > 7:
            raise BadProfile("packed counts hold a number with needless bytes")
        else:
            yield value
            value = shift = 0
    if shift:
        raise BadProfile("packed counts end in the middle of a number")
