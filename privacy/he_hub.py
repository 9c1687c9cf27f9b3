"""The hub's side of encrypted sums (:mod:`atoll.privacy.he`): relays keys, adds ciphertexts.

Nothing here can open anything. The session keeps what a device dealt, in the form in which
only devices can open it, for as long as a run lasts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from atoll.privacy import agreement, bfv, frames, terms, wrapping
from atoll.privacy.errors import Refused, SumFailed, TooFewSurvivors
from atoll.privacy.frames import Frame
from atoll.privacy.he import (
    AGREE,
    DEAL,
    DECRYPT,
    Certificates,
    body_context,
    key_id,
    roster_digest,
)
from atoll.privacy.packing import Layout
from atoll.privacy.sums import CONTRIBUTE, Ask, Integers, SumSpec, Total

DECRYPTORS: Final = 2


@dataclass(slots=True)
class Deal:
    """A key as the hub has it: for others to open.

    ``holders`` are the parties that have it open, so that it need not be sent again;
    ``proven`` once a sum has been opened with it.
    """

    run: str
    dealer: str
    plain_bits: int
    name: str
    body: bytes
    wraps: Mapping[str, bytes]
    holders: set[str] = field(default_factory=set)
    proven: bool = False


class HeHubSession:
    """The hub's side of all sums of a plan; ``roster`` maps each party to its certificate."""

    def __init__(self, roster: Certificates) -> None:
        self.roster = dict(sorted(roster.items()))
        self.keys = {name: wrapping.certified_key(pem) for name, pem in self.roster.items()}
        self.plain_bits = bfv.plain_bits_for(len(self.roster))
        self.deal: Deal | None = None
        self.failed_dealers: set[str] = set()

    def open(self, spec: SumSpec, parties: Sequence[str]) -> "HeHub":
        """Return the hub's side of one sum.

        Raises :class:`atoll.privacy.errors.BadParameters` for what cannot be decoded.
        """
        strangers = set(parties) - set(self.roster)
        if strangers:
            raise SumFailed(f"no certificate is known of {', '.join(sorted(strangers))}")
        if self.deal is not None and self.deal.run != spec.key.run:
            self.deal = None
            self.failed_dealers.clear()
        return HeHub(self, spec, parties)

    def drop_deal(self) -> None:
        """Forget a key that did not work out, and ask another dealer next time."""
        if self.deal is not None and not self.deal.proven:
            self.failed_dealers.add(self.deal.dealer)
            self.deal = None

    def dump(self) -> bytes:
        """Return what a restarted hub needs to go on without a new key; nothing secret."""
        deal = self.deal
        if deal is None:
            return b""
        names = sorted(deal.wraps)
        head = {
            "run": deal.run,
            "dealer": deal.dealer,
            "plain_bits": deal.plain_bits,
            "roster": roster_digest(self.roster),
            "names": names,
            "proven": deal.proven,
        }
        return frames.pack(head, [deal.body, *(deal.wraps[name] for name in names)])

    def load(self, data: bytes) -> None:
        """Take back what :meth:`dump` returned; raise :class:`Refused` when it does not fit.

        A session that could not load simply has a new key dealt.
        """
        if not data:
            return
        frame = frames.unpack(data)
        if frame.text("roster") != roster_digest(self.roster):
            raise Refused("a key that was dealt to another roster")
        run, dealer = frame.text("run"), frame.text("dealer")
        deal = _read_deal(frame, self.roster, run, dealer, frame.number("plain_bits"))
        deal.proven = frame.head.get("proven") is True
        self.deal = deal


def _read_deal(frame: Frame, roster: Certificates, run: str, dealer: str, plain_bits: int) -> Deal:
    names = frame.texts("names")
    if names != sorted(roster) or len(frame.parts) != len(names) + 1:
        raise Refused("a key that was not wrapped for everybody")
    body, wraps = frame.parts[0], dict(zip(names, frame.parts[1:], strict=True))
    context = body_context(run, dealer, roster_digest(roster), plain_bits)
    return Deal(run, dealer, plain_bits, key_id(context, body), body, wraps)


class HeHub:
    """The hub's side of one encrypted sum."""

    def __init__(self, session: HeHubSession, spec: SumSpec, parties: Sequence[str]) -> None:
        self._session = session
        self._spec = spec
        self._parties = sorted(parties)
        # Rounds take turns at dealing and decrypting.
        turn = spec.key.round % max(1, len(self._parties))
        self._turns = self._parties[turn:] + self._parties[:turn]
        self._layout = Layout.of(spec, session.plain_bits)
        self._adder = bfv.Adder(session.plain_bits)
        self._phase = ""
        self._waiting: set[str] = set()
        self._sum: list[bfv.Ciphertext] = []
        self._survivors: list[str] = []
        self._signatures: dict[str, bytes] = {}
        self._opened: dict[str, Integers] = {}
        self._tried: set[str] = set()

    def start(self) -> Ask:
        """Ask for a key, or for terms when there is one."""
        if self._session.deal is None:
            return self._ask_dealer()
        return self._ask_terms()

    def receive(self, party: str, reply: bytes) -> None:
        """Fold in one reply; raise :class:`Refused` for one that must not be used."""
        if party not in self._waiting:
            raise Refused(f"nothing is expected of {party!r}")
        frame = frames.unpack(reply)
        frames.check_address(frame, self._spec.key, self._phase, party)
        fold = {
            DEAL: self._fold_deal,
            CONTRIBUTE: self._fold_term,
            AGREE: self._fold_signature,
            DECRYPT: self._fold_opened,
        }[self._phase]
        fold(party, frame)
        self._waiting.remove(party)

    def advance(self) -> Ask | Total:
        """End the phase; raise :class:`SumFailed` or :class:`TooFewSurvivors`."""
        phase, self._phase, self._waiting = self._phase, "", set()
        if phase == DEAL:
            return self._ask_terms() if self._session.deal is not None else self._ask_dealer()
        if phase == CONTRIBUTE:
            return self._end_terms()
        if phase == AGREE:
            return self._end_agreement()
        if phase == DECRYPT:
            return self._end_opening()
        raise SumFailed("this sum is over, or was never started")

    def _ask(self, phase: str, parties: Sequence[str], head: Mapping[str, object],
             parts: Mapping[str, Sequence[bytes]]) -> Ask:  # fmt: skip
        self._phase, self._waiting = phase, set(parties)
        key = self._spec.key
        return Ask(
            phase,
            {
                party: frames.pack(
                    {**head, **frames.address(key, phase, party)}, parts.get(party, ())
                )
                for party in parties
            },
        )

    # deal

    def _ask_dealer(self) -> Ask:
        able = [name for name in self._turns if name not in self._tried]
        # Those whose key did not work before come last, not never.
        able.sort(key=lambda name: name in self._session.failed_dealers)
        if not able:
            raise SumFailed("none of the devices could make the run's key")
        dealer = able[0]
        self._tried.add(dealer)
        head = {"roster": list(self._session.roster), "plain_bits": self._session.plain_bits}
        return self._ask(DEAL, [dealer], head, {dealer: list(self._session.roster.values())})

    def _fold_deal(self, party: str, frame: Frame) -> None:
        session = self._session
        session.deal = _read_deal(
            frame, session.roster, self._spec.key.run, party, session.plain_bits
        )

    def _deal(self) -> Deal:
        deal = self._session.deal
        if deal is None:
            raise SumFailed("the run's key was given up by another round")
        return deal

    # contribute

    def _ask_terms(self) -> Ask:
        deal, roster = self._deal(), self._session.roster
        head: dict[str, object] = {
            "key": deal.name,
            "dealer": deal.dealer,
            "plain_bits": deal.plain_bits,
            "roster": list(roster),
        }
        certificates = list(roster.values())
        keys = {
            party: [*certificates, deal.body, deal.wraps[party]]
            for party in self._parties
            if party not in deal.holders
        }
        return self._ask(CONTRIBUTE, self._parties, head, keys)

    def _fold_term(self, party: str, frame: Frame) -> None:
        if frame.text("key") != self._deal().name:
            raise Refused("a term under another key")
        if len(frame.parts) != self._layout.blocks:
            raise Refused("a term of another length")
        # Every block is read before any is added: a term is in the sum whole or not at all.
        blocks = [self._adder.read(part) for part in frame.parts]
        if not self._sum:
            self._sum = blocks
        else:
            for total, block in zip(self._sum, blocks, strict=True):
                self._adder.add(total, block)
        self._survivors.append(party)

    def _end_terms(self) -> Ask:
        deal = self._deal()
        survivors = self._survivors = sorted(self._survivors)
        deal.holders = (deal.holders - set(self._parties)) | set(survivors)
        needed = max(2, self._spec.min_survivors)
        if len(survivors) < needed:
            self._session.drop_deal()
            raise TooFewSurvivors(len(survivors), needed)
        return self._ask(AGREE, survivors, {"key": deal.name, "survivors": survivors}, {})

    # agree

    def _fold_signature(self, party: str, frame: Frame) -> None:
        if len(frame.parts) != 1:
            raise Refused("an agreement is one signature")
        statement = agreement.statement(self._spec.key, self._deal().name, self._survivors)
        wrapping.verify(self._session.keys[party], frame.parts[0], statement, party)
        self._signatures[party] = frame.parts[0]

    def _end_agreement(self) -> Ask:
        needed = agreement.quorum(self._spec.parties, self._spec.min_survivors)
        if len(self._signatures) < needed:
            raise SumFailed(
                f"{len(self._signatures)} of {len(self._survivors)} devices agreed on whose "
                f"terms are in the sum, and opening it needs {needed}"
            )
        self._tried = set()
        return self._ask_decryptors(DECRYPTORS)

    # decrypt

    def _ask_decryptors(self, count: int) -> Ask:
        able = [name for name in self._turns if name in self._survivors and name not in self._tried]
        # Whoever just agreed is likelier to answer.
        able.sort(key=lambda name: name not in self._signatures)
        if len(able) < count:
            raise SumFailed(f"{DECRYPTORS} devices must open the sum, and too few answered")
        chosen = able[:count]
        self._tried.update(chosen)
        signers = sorted(self._signatures)
        head = {"key": self._deal().name, "survivors": self._survivors, "signers": signers}
        parts = [self._signatures[name] for name in signers]
        parts += [self._adder.write(total) for total in self._sum]
        return self._ask(DECRYPT, chosen, head, dict.fromkeys(chosen, parts))

    def _fold_opened(self, party: str, frame: Frame) -> None:
        if len(frame.parts) != 1:
            raise Refused("an opened sum is one list of values")
        limit = self._spec.bound * len(self._survivors)
        self._opened[party] = terms.from_bytes(frame.parts[0], self._spec.length, limit)

    def _end_opening(self) -> Ask | Total:
        if len(self._opened) < DECRYPTORS:
            return self._ask_decryptors(DECRYPTORS - len(self._opened))
        (first, one), (second, other) = self._opened.items()
        if not np.array_equal(one, other):
            raise SumFailed(f"{first} and {second} opened the sum and do not agree")
        self._deal().proven = True
        return Total(one, tuple(self._survivors))
