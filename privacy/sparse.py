"""Terms with many zeros, written as where they are not zero and what stands there.

    to_parts(values, length, bound) -> the fewest bytes: [values] or [positions, values]
    view(parts, length, bound) -> (length,), in the narrow integers in which values travel

Positions come as a bitmap of the whole term, or as the gaps between them, each in as many bytes as
it has sevens of bits, the highest bit of a byte saying that another follows (LEB128); whichever
is shorter, and its first byte says which. Values are as narrow as in :mod:`atoll.privacy.terms`.
Only a sum that hides nothing can write terms so. A dense term is one part, as ever.

Every term has one form of either kind. Anything else is refused: positions outside the term, more
of them than it has, zeros among the values, gaps longer than they need be. What a hostile sender
can cost is the memory of a term and of its own message; no position can come twice, because a
gap is at least one.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atoll.privacy import terms
from atoll.privacy.errors import Refused
from atoll.privacy.sums import Integers

BITMAP: Final = b"\0"
GAPS: Final = b"\1"

_SEVEN: Final = np.uint64(7)
_LOW: Final = np.uint64(0x7F)
_LOW_BITS: Final = 0x7F
_MORE: Final = 0x80
_LONGEST: Final = 5
"""Bytes of one gap: terms have fewer than 2**35 values."""


def to_parts(values: Integers | None, length: int, bound: int) -> list[bytes | memoryview]:
    """Check values and write them: densely, or sparsely where that is less.

    Raises :class:`Refused` as :func:`atoll.privacy.terms.check` does.
    """
    narrow = terms.narrowed(values, length, bound)
    width, whole = narrow.itemsize, narrow.view(np.uint8).data
    count = int(np.count_nonzero(narrow))
    # Positions take as many bytes as there are, or an eighth of the length, and one more: this
    # much can be said without writing any.
    if count * width + min(count, length // 8) >= length * width:
        return [whole]
    some = narrow != 0
    places = np.flatnonzero(some)
    gaps, bitmap = _gaps(places), np.packbits(some, bitorder="little").tobytes()
    positions = GAPS + gaps if len(gaps) < len(bitmap) else BITMAP + bitmap
    if len(positions) + count * width >= length * width:
        return [whole]
    return [positions, narrow[places].view(np.uint8).data]


def view(parts: Sequence[bytes | memoryview], length: int, bound: int) -> "npt.NDArray[Any]":
    """Read what :func:`to_parts` wrote; raise :class:`Refused` for anything else.

    Values are still to be checked, as those of :func:`atoll.privacy.terms.view` are.
    """
    if len(parts) == 1:
        return terms.view(parts[0], length, bound)
    if len(parts) != 2:
        raise Refused(f"a term of {len(parts)} parts")
    positions, told = parts
    places = _places(positions, length)
    values = np.zeros(length, dtype=terms.dtype(bound))
    some = terms.view(told, places.size, bound)
    if not some.all():
        raise Refused("a zero among the values that are said not to be")
    values[places] = some
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


def _places(positions: bytes | memoryview, length: int) -> npt.NDArray[np.int64]:
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
    if not ends.size or ends[-1] != body.size - 1:
        raise Refused("gaps cut short")
    # Before anything as long as the message is made: a byte more stands for 127 places at least.
    if ends.size > length or body.size - ends.size > length // _LOW_BITS:
        raise Refused("more gaps, or longer ones, than the term has room for")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if int(sizes.max()) > _LONGEST:
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
