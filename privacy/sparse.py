"""Terms with many zeros, written as where they are not zero and what stands there.

    to_parts(values, bound) -> the fewest bytes: [values] or [positions, values]
    from_parts(parts, length, bound) -> int64 (length,)

Positions come as a bitmap of the whole term, or as the gaps between them, each in as many bytes as
it has sevens of bits, the highest bit of a byte saying that another follows (LEB128); whichever
is shorter, and its first byte says which. Values are as narrow as in :mod:`atoll.privacy.terms`.
Only a sum that hides nothing can write terms so.

Every term has one sparse form. Anything else is refused: positions outside the term, more of them
than it has, zeros among the values, gaps longer than they need be. What a hostile sender
can cost is the memory of a term and of its own message; no position can come twice, because a
gap is at least one.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.privacy import terms
from atoll.privacy.errors import Refused
from atoll.privacy.sums import Integers

BITMAP: Final = b"\0"
GAPS: Final = b"\1"

_SEVEN: Final = np.uint64(7)
_LOW: Final = np.uint64(0x7F)
_MORE: Final = 0x80
_LONGEST: Final = 5
"""Bytes of one gap: terms have fewer than 2**35 values."""


def to_parts(values: Integers, bound: int) -> list[bytes]:
    """Write values in ``±bound``, int64 ``(length,)``: densely, or sparsely where that is less."""
    dense = values.size * terms.dtype(bound).itemsize
    places = np.flatnonzero(values)
    # A position takes an eighth of a byte at least, so this can be said without writing any.
    if places.size * terms.dtype(bound).itemsize + min(places.size, values.size // 8) >= dense:
        return [terms.to_bytes(values, bound)]
    gaps, bitmap = _gaps(places), np.packbits(values != 0, bitorder="little").tobytes()
    positions = GAPS + gaps if len(gaps) < len(bitmap) else BITMAP + bitmap
    told = terms.to_bytes(values[places], bound)
    if len(positions) + len(told) >= dense:
        return [terms.to_bytes(values, bound)]
    return [positions, told]


def from_parts(parts: Sequence[bytes], length: int, bound: int) -> Integers:
    """Read what :func:`to_parts` wrote; raise :class:`Refused` for anything else."""
    if len(parts) == 1:
        return terms.from_bytes(parts[0], length, bound)
    if len(parts) != 2:
        raise Refused(f"a term of {len(parts)} parts")
    positions, told = parts
    places = _places(positions, length)
    values = np.zeros(length, dtype=np.int64)
    if places.size:
        some = terms.from_bytes(told, places.size, bound)
        if not some.all():
            raise Refused("a zero among the values that are said not to be")
        values[places] = some
    elif told:
        raise Refused(f"{len(told)} bytes of values for no position")
    return values


def _gaps(places: npt.NDArray[np.int64]) -> bytes:
    """Return the distances from one position to the next, less one, as LEB128."""
    gaps = np.diff(places, prepend=-1).astype(np.uint64) - np.uint64(1)
    sizes = np.ones(gaps.size, dtype=np.int64)
    for more in range(1, _LONGEST):
        sizes += gaps >> np.uint64(7 * more) > 0
    starts = np.cumsum(sizes) - sizes
    out = np.zeros(int(sizes.sum()), dtype=np.uint8)
    for at in range(_LONGEST):
        long = sizes > at
        low = (gaps[long] >> np.uint64(7 * at) & _LOW).astype(np.uint8)
        out[starts[long] + at] = low | np.where(sizes[long] > at + 1, _MORE, 0).astype(np.uint8)
    return out.tobytes()


def _places(positions: bytes, length: int) -> npt.NDArray[np.int64]:
    kind, body = positions[:1], np.frombuffer(positions, dtype=np.uint8)[1:]
    if kind == BITMAP:
        if body.size != -(-length // 8):
            raise Refused(f"a bitmap of {body.size} bytes for {length} values")
        bits = np.unpackbits(body, bitorder="little")
        if bits[length:].any():
            raise Refused("a bitmap with positions behind the term")
        return np.flatnonzero(bits)
    if kind != GAPS:
        raise Refused("positions that are neither a bitmap nor gaps")
    return _from_gaps(body, length)


def _from_gaps(body: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.int64]:
    if not body.size:
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(body < _MORE)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if not ends.size or ends[-1] != body.size - 1:
        raise Refused("gaps cut short")
    sizes = ends - starts + 1
    if ends.size > length or int(sizes.max()) > _LONGEST:
        raise Refused("more gaps, or longer ones, than the term has room for")
    if (body[ends[sizes > 1]] == 0).any():
        raise Refused("a gap longer than it need be")
    within = np.arange(body.size) - np.repeat(starts, sizes)
    shifted = (body.astype(np.uint64) & _LOW) << (_SEVEN * within.astype(np.uint64))
    gaps = np.add.reduceat(shifted, starts).astype(np.int64)
    if int(gaps.max()) >= length:
        raise Refused("a position behind the term")
    # Each gap is below the length, and there are no more of them: the sum fits 64 bits.
    places = np.cumsum(gaps + 1) - 1
    if int(places[-1]) >= length:
        raise Refused("a position behind the term")
    return places
