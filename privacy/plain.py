"""A sum that hides nothing from the hub: each term arrives as it is and is added at once.

For cohorts that trust the hub, for robust rules that must see updates, and as the yardstick
of the others. The hub holds the running sum and never a second term, unless it is opened with
:meth:`PlainHubSession.collect`: then it keeps the terms, for who must look at each. A term of many
zeros travels sparsely (:mod:`atoll.privacy.sparse`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from atoll.privacy import frames, sparse, terms
from atoll.privacy.errors import Refused, SumFailed, TooFewSurvivors
from atoll.privacy.running import RunningTotal
from atoll.privacy.sums import CONTRIBUTE, Ask, Integers, SumSpec, Total


@dataclass(frozen=True, slots=True)
class Collected(Total):
    """A sum with its terms: integers as narrow as travelled, a row for each of ``survivors``."""

    terms: npt.NDArray[Any]


class PlainHub:
    """The hub's side of one plain sum."""

    def __init__(self, spec: SumSpec, parties: Sequence[str]) -> None:
        self._spec = spec
        self._waiting = set(parties)
        self._sum = RunningTotal(spec)
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
        """Add one term where it lies; raise :class:`Refused` for one that must not be added."""
        if not self._open or party not in self._waiting:
            raise Refused(f"nothing is expected of {party!r}")
        frame = frames.view(reply)
        frames.check_address(frame, self._spec.key, CONTRIBUTE, party)
        self._add(party, sparse.view(frame.parts, self._spec.length, self._spec.bound))
        self._waiting.remove(party)
        self._survivors.append(party)

    def advance(self) -> Total:
        """Return the sum; raise :class:`TooFewSurvivors` below the minimum."""
        if not self._open:
            raise SumFailed("this sum is over, or was never started")
        self._open = False
        if len(self._survivors) < self._spec.min_survivors:
            raise TooFewSurvivors(len(self._survivors), self._spec.min_survivors)
        return Total(self._sum.values(), tuple(sorted(self._survivors)))

    def _add(self, party: str, term: npt.NDArray[Any]) -> None:
        del party
        self._sum.add(term)


class CollectingHub(PlainHub):
    """The hub's side of one plain sum whose terms are kept until it is over."""

    def __init__(self, spec: SumSpec, parties: Sequence[str]) -> None:
        super().__init__(spec, parties)
        self._rows = {party: row for row, party in enumerate(sorted(parties))}
        self._terms = np.zeros((len(self._rows), spec.length), terms.dtype(spec.bound))

    def advance(self) -> Collected:
        """Return the sum and its terms, as :meth:`PlainHub.advance` does."""
        total = super().advance()
        rows = [self._rows[party] for party in total.survivors]
        kept = self._terms if len(rows) == len(self._rows) else self._terms[rows]
        return Collected(total.values, total.survivors, kept)

    def _add(self, party: str, term: npt.NDArray[Any]) -> None:
        super()._add(party, term)
        self._terms[self._rows[party]] = term


class PlainHubSession:
    """Keeps nothing between rounds."""

    def open(self, spec: SumSpec, parties: Sequence[str]) -> PlainHub:
        """Return the hub's side of one sum."""
        return PlainHub(spec, parties)

    def collect(self, spec: SumSpec, parties: Sequence[str]) -> CollectingHub:
        """Return the hub's side of one sum that ends with its terms (:class:`Collected`)."""
        return CollectingHub(spec, parties)

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
        self._answered = terms.Answered()

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Hand over the term; the same bytes again when asked again for the same round."""
        if phase != CONTRIBUTE:
            raise Refused(f"a plain sum has no phase {phase!r}")
        frame = frames.unpack(payload)
        frames.check_address(frame, spec.key, CONTRIBUTE, self._party)
        before = self._answered.before(spec, payload)
        if before is not None:
            return before
        reply = frames.pack(
            frames.address(spec.key, CONTRIBUTE, self._party),
            sparse.to_parts(term, spec.length, spec.bound),
        )
        self._answered.remember(spec, payload, reply)
        return reply
