"""What every sum does with terms: check them, write them narrowly, and give only one a round."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.sums import Integers, SumSpec

_DTYPES: Final = {np.iinfo(name).max: np.dtype(name) for name in ("<i1", "<i2", "<i4", "<i8")}
_STRETCH: Final = 1 << 17


def check(values: Integers | None, length: int, bound: int) -> Integers:
    """Return ``values``, or raise :class:`Refused` unless int64 ``(length,)`` in ``±bound``."""
    if values is None:
        raise Refused("a contribution needs a term")
    if values.shape != (length,) or values.dtype != np.int64:
        raise Refused(
            f"a term of shape {values.shape}, {values.dtype}; wanted ({length},) of int64"
        )
    if np.minimum.reduce(values) < -bound or np.maximum.reduce(values) > bound:
        raise Refused(f"a term with a value outside ±{bound}")
    return values


def to_bytes(values: Integers | None, length: int, bound: int) -> memoryview:
    """Check values and write them in the narrowest integers that hold them, little-endian.

    Raises :class:`Refused` as :func:`check` does.
    """
    return narrowed(values, length, bound).view(np.uint8).data


def narrowed(values: Integers | None, length: int, bound: int) -> "npt.NDArray[Any]":
    """Check values and return them, ``(length,)``, in the narrowest integers that hold them.

    Raises :class:`Refused` as :func:`check` does. Each stretch is checked and copied while it is
    in the processor's cache.
    """
    narrow = np.empty(length, dtype=dtype(bound))
    if values is None or values.shape != (length,):
        check(values, length, bound)
    else:
        for start in range(0, length, _STRETCH):
            part = values[start : start + _STRETCH]
            narrow[start : start + _STRETCH] = check(part, part.size, bound)
    return narrow


def from_bytes(data: bytes, length: int, bound: int) -> Integers:
    """Read what :func:`to_bytes` wrote; raise :class:`Refused` for anything else."""
    return check(view(data, length, bound).astype(np.int64), length, bound)


def view(data: bytes | memoryview, length: int, bound: int) -> "npt.NDArray[Any]":
    """Read what :func:`to_bytes` wrote where it lies, in its narrow integers.

    Its values are still to be checked. Raises :class:`Refused` for another length.
    """
    narrow = dtype(bound)
    if len(data) != length * narrow.itemsize:
        raise Refused(f"{len(data)} bytes instead of {length} values")
    return np.frombuffer(data, dtype=narrow)


def dtype(bound: int) -> "np.dtype[Any]":
    """Return the narrowest integers that hold ``±bound``; raise :class:`BadParameters`."""
    for highest, narrow in _DTYPES.items():
        if bound <= highest:
            return narrow
    raise BadParameters(f"values up to {bound} do not fit 64 bits; lower privacy.bits")


class Answered:
    """A party's last contribution, so that no round gets a second, different one.

    Two terms of one round, each with its own noise, would average to less noise than the
    ledger was charged for. The same question therefore gets the same bytes, and another
    question for that round, or for an older one of its run, gets none.
    """

    def __init__(self) -> None:
        self.spec: SumSpec | None = None
        self._payload = b""
        self._reply = b""

    def before(self, spec: SumSpec, payload: bytes) -> bytes | None:
        """Return what was answered to this before, or none; raise :class:`Refused`."""
        last = self.spec
        if last is None or last.key.run != spec.key.run or spec.key.round > last.key.round:
            return None
        if spec == last and payload == self._payload:
            return self._reply
        raise Refused(f"round {spec.key.round} of run {spec.key.run} has been answered already")

    def remember(self, spec: SumSpec, payload: bytes, reply: bytes) -> None:
        """Keep ``reply`` as the answer to ``payload``."""
        self.spec, self._payload, self._reply = spec, payload, reply
