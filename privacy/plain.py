"""A sum that hides nothing from the hub: each term arrives as it is and is added at once.

For cohorts that trust the hub, for robust rules that must see updates, and as the yardstick
of the others. The hub holds the running sum and never a second term.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from atoll.privacy import frames
from atoll.privacy.errors import Refused, SumFailed, TooFewSurvivors
from atoll.privacy.sums import CONTRIBUTE, Ask, Integers, SumSpec, Total


class PlainHub:
    """The hub's side of one plain sum."""

    def __init__(self, spec: SumSpec, parties: Sequence[str]) -> None:
        self._spec = spec
        self._waiting = set(parties)
        self._sum: Integers = np.zeros(spec.length, dtype=np.int64)
        self._survivors: list[str] = []
        self._open = False

    def start(self) -> Ask:
        """Ask every party for its term."""
        self._open = True
        key = self._spec.key
        return Ask(
            CONTRIBUTE,
            {
                party: frames.pack(frames.address(key, CONTRIBUTE, party))
                for party in sorted(self._waiting)
            },
        )

    def receive(self, party: str, reply: bytes) -> None:
        """Add one term; raise :class:`Refused` for one that must not be added."""
        if not self._open or party not in self._waiting:
            raise Refused(f"nothing is expected of {party!r}")
        frame = frames.unpack(reply)
        frames.check_address(frame, self._spec.key, CONTRIBUTE, party)
        self._sum += _term(frame, self._spec)
        self._waiting.remove(party)
        self._survivors.append(party)

    def advance(self) -> Total:
        """Return the sum; raise :class:`TooFewSurvivors` below the minimum."""
        if not self._open:
            raise SumFailed("this sum is over, or was never started")
        self._open = False
        if len(self._survivors) < self._spec.min_survivors:
            raise TooFewSurvivors(len(self._survivors), self._spec.min_survivors)
        return Total(self._sum, tuple(sorted(self._survivors)))


class PlainHubSession:
    """Keeps nothing between rounds."""

    def open(self, spec: SumSpec, parties: Sequence[str]) -> PlainHub:
        """Return the hub's side of one sum."""
        return PlainHub(spec, parties)

    def dump(self) -> bytes:
        """Return nothing: there is nothing to keep over a restart."""
        return b""

    def load(self, data: bytes) -> None:
        """Take back what :meth:`dump` returned."""
        if data:
            raise Refused("a plain sum keeps nothing between rounds")


class PlainParty:
    """One party's side of plain sums."""

    def __init__(self, party: str) -> None:
        self._party = party
        self._answered = Answered()

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Hand over the term; the same bytes again when asked again for the same round."""
        if phase != CONTRIBUTE:
            raise Refused(f"a plain sum has no phase {phase!r}")
        frame = frames.unpack(payload)
        frames.check_address(frame, spec.key, CONTRIBUTE, self._party)
        before = self._answered.before(spec, payload)
        if before is not None:
            return before
        values = check_term(spec, term).astype(_dtype(spec.bound))
        reply = frames.pack(
            frames.address(spec.key, CONTRIBUTE, self._party), [values.tobytes()]
        )
        return self._answered.with_(spec, payload, reply)


class Answered:
    """The last contribution of a party, so that no round gets a second, different one.

    Two terms of one round, each with its own noise, would average to less noise than the
    ledger was charged for. The same question therefore gets the same bytes; another question
    for that round, or for an older one of its run, gets nothing.
    """

    def __init__(self) -> None:
        self._spec: SumSpec | None = None
        self._payload = b""
        self._reply = b""

    def before(self, spec: SumSpec, payload: bytes) -> bytes | None:
        """Return what was answered to this before, or none; raise :class:`Refused`."""
        last = self._spec
        if last is None or last.key.run != spec.key.run or spec.key.round > last.key.round:
            return None
        if spec == last and payload == self._payload:
            return self._reply
        raise Refused(f"round {spec.key.round} of run {spec.key.run} has been answered")

    def with_(self, spec: SumSpec, payload: bytes, reply: bytes) -> bytes:
        """Remember and return ``reply``."""
        self._spec, self._payload, self._reply = spec, payload, reply
        return reply


_DTYPES: Final = tuple(np.dtype(name) for name in ("<i1", "<i2", "<i4", "<i8"))


def _dtype(bound: int) -> np.dtype[np.signedinteger]:  # type: ignore[type-arg]
    """Return the narrowest type that holds ``[-bound, bound]``."""
    for dtype in _DTYPES:
        if bound <= np.iinfo(dtype).max:
            return dtype
    raise Refused(f"a bound of {bound} does not fit 64 bits")


def _term(frame: frames.Frame, spec: SumSpec) -> Integers:
    dtype = _dtype(spec.bound)
    if len(frame.parts) != 1 or len(frame.parts[0]) != spec.length * dtype.itemsize:
        raise Refused("a term of another length")
    return check_term(spec, np.frombuffer(frame.parts[0], dtype=dtype).astype(np.int64))


def check_term(spec: SumSpec, term: Integers | None) -> Integers:
    """Return ``term``, or raise :class:`Refused` when it is not what ``spec`` says."""
    if term is None:
        raise Refused("a contribution needs a term")
    if term.shape != (spec.length,) or term.dtype != np.int64:
        raise Refused(f"a term of shape {term.shape}, {term.dtype}; wanted ({spec.length},) int64")
    if int(term.min()) < -spec.bound or int(term.max()) > spec.bound:
        raise Refused(f"a term with a value outside ±{spec.bound}")
    return term
