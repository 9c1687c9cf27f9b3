"""The one shape of every private sum, whatever hides its terms.

A sum is a short conversation. The hub side (:class:`HubSum`) is a state machine that names a
phase and a payload for each party; each party's side (:class:`PartySum`) answers a phase with
bytes. Nothing here sends anything: the caller carries the payloads, by Flower messages or by
a loop in a test. One phase, :data:`CONTRIBUTE`, carries the party's term; phases before it
set up keys, phases after it open the sum.

    ask = hub.start()
    while isinstance(ask, Ask):
        for party, payload in ask.payloads.items():
            hub.receive(party, parties[party].answer(ask.phase, payload, term_of(party)))
        ask = hub.advance()
    total = ask          # a Total

A party that never answers is a drop-out: call ``advance`` without its reply. Below the
minimum number of survivors ``advance`` raises :class:`TooFewSurvivors` and nothing is decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from atoll.privacy.errors import BadParameters

Integers = npt.NDArray[np.int64]

CONTRIBUTE: Final = "contribute"


@dataclass(frozen=True, slots=True)
class RoundKey:
    """What a sum belongs to; bound into every key and payload so that none can be replayed."""

    run: str
    round: int


@dataclass(frozen=True, slots=True)
class SumSpec:
    """What hub and parties must agree on before a sum.

    ``length`` values per term, each in ``[-bound, bound]``; at most ``parties`` terms, and at
    least ``min_survivors`` or nothing is decoded.
    """

    key: RoundKey
    length: int
    bound: int
    parties: int
    min_survivors: int

    def __post_init__(self) -> None:
        """Refuse a sum of nothing; raise :class:`BadParameters`."""
        if min(self.length, self.bound, self.parties, self.min_survivors) < 1:
            raise BadParameters(
                f"a sum of {self.length} values up to {self.bound} over {self.parties} parties, "
                f"{self.min_survivors} at least: each must be 1 or more"
            )


@dataclass(frozen=True, slots=True)
class Ask:
    """The next phase: send each payload to its party and bring back what it answers."""

    phase: str
    payloads: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Total:
    """The sum over ``survivors``: int64 of shape ``(length,)``."""

    values: Integers
    survivors: Sequence[str]


class HubSum(Protocol):
    """The hub's side of one sum."""

    def start(self) -> Ask:
        """Return the first phase."""
        ...

    def receive(self, party: str, reply: bytes) -> None:
        """Fold in one reply to the current phase.

        Raises :class:`atoll.privacy.errors.Refused` when it is malformed, repeated, from
        another round or from a party that was not asked; the sum goes on without it.
        """
        ...

    def advance(self) -> Ask | Total:
        """End the current phase with the replies there are.

        Raises :class:`atoll.privacy.errors.TooFewSurvivors` or
        :class:`atoll.privacy.errors.SumFailed`; nothing is decoded then.
        """
        ...


class PartySum(Protocol):
    """One party's side of a sum; lives for one plan and may keep keys between rounds."""

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Answer one phase; ``term`` is given in the :data:`CONTRIBUTE` phase alone.

        Raises :class:`atoll.privacy.errors.Refused` for a payload it must not answer.
        """
        ...
