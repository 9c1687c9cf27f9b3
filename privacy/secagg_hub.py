"""The hub's side of masked sums (:mod:`atoll.privacy.secagg`): relays, adds, takes masks off.

It keeps one running sum. What it learns is the seeds of devices whose terms are in the sum and the
masking keys of those whose are not; the sum alone is left when those masks are gone.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from atoll.privacy import agreement, frames, shamir, wrapping
from atoll.privacy.errors import Refused, SumFailed, TooFewSurvivors
from atoll.privacy.frames import Frame
from atoll.privacy.ring import Mask, Ring, RunningSum, add_masks
from atoll.privacy.secagg import AGREE, SHARE, UNMASK
from atoll.privacy.secagg_keys import (
    ADVERTISE,
    Advert,
    Gathering,
    advert_statement,
    commitment_to,
    digest_of,
    pair_mask,
    seed_mask,
    shared,
    sum_context,
)
from atoll.privacy.sums import CONTRIBUTE, Ask, RoundKey, SumSpec, Total

_TRIES: Final = 500
"""Sets of pieces that are tried. Of ten devices, seven of whom open a secret, two may lie: one set
in fifteen is without them."""


@dataclass(slots=True)
class Ready:
    """What a round needs before terms can be asked for."""

    key: RoundKey
    adverts: dict[str, bytes] = field(default_factory=dict)
    sealed: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Pieces by dealer and then by holder, for holders to open."""
    gathering: Gathering | None = None

    def gather(self) -> Gathering:
        """Fix who advertised what, once."""
        if self.gathering is None:
            digests = {name: digest_of(advert) for name, advert in self.adverts.items()}
            self.gathering = Gathering(self.key, digests)
        return self.gathering

    def serves(self, spec: SumSpec, parties: Sequence[str]) -> bool:
        """Tell whether a round over ``parties`` can begin with the terms."""
        if self.key != spec.key or self.gathering is None or not set(parties) <= set(self.sealed):
            return False
        return all(_enough_near(self.gathering, party, parties, spec) for party in parties)


class SecaggHubSession:
    """The hub's side of all sums of a plan; ``roster`` maps each party to its certificate."""

    def __init__(self, roster: Mapping[str, bytes]) -> None:
        self.roster = dict(sorted(roster.items()))
        self.keys = {name: wrapping.certified_key(pem) for name, pem in self.roster.items()}
        self.following: Ready | None = None
        """What the former round has prepared for this one."""
        self.probe = X25519PrivateKey.generate()
        self.shown: dict[str, set[str]] = {name: set() for name in self.roster}
        """Whose certificates each party has."""

    def open(self, spec: SumSpec, parties: Sequence[str]) -> "SecaggHub":
        """Return the hub's side of one sum.

        Raises :class:`atoll.privacy.errors.BadParameters` for what cannot be decoded.
        """
        strangers = set(parties) - set(self.roster)
        if strangers:
            raise SumFailed(f"no certificate is known of {', '.join(sorted(strangers))}")
        ready, self.following = self.following, None
        if ready is None or not ready.serves(spec, parties):
            ready = Ready(spec.key)
        return SecaggHub(self, spec, parties, ready)

    def dump(self) -> bytes:
        """Return nothing: keys are of one round, and a restarted hub begins it anew."""
        return b""

    def load(self, data: bytes) -> None:
        """Take back what :meth:`dump` returned."""
        if data:
            raise Refused("a masked sum keeps nothing over a restart")

    def certificate(self, party: str, name: str) -> bytes:
        """Return a certificate for ``party``, or nothing when it has been shown it."""
        if name in self.shown[party]:
            return b""
        self.shown[party].add(name)
        return self.roster[name]


class SecaggHub:
    """The hub's side of one masked sum."""

    def __init__(
        self, session: SecaggHubSession, spec: SumSpec, parties: Sequence[str], ready: Ready
    ) -> None:
        self._session = session
        self._spec = spec
        self._parties = sorted(parties)
        self._ready = ready
        self._following = Ready(RoundKey(spec.key.run, spec.key.round + 1))
        self._ring = Ring.of(spec)
        self._phase = ""
        self._waiting: set[str] = set()
        self._sharers: list[str] = []
        self._context = b""
        self._sum = RunningSum(self._ring)
        self._survivors: list[str] = []
        self._signatures: dict[str, bytes] = {}
        self._pieces: dict[str, Mapping[str, bytes]] = {}

    def start(self) -> Ask:
        """Ask for keys, or for terms where the former round has seen to the keys."""
        if self._ready.gathering is not None:
            return self._ask_terms(self._parties)
        return self._ask(ADVERTISE, dict.fromkeys(self._parties, ((), {})))

    def receive(self, party: str, reply: bytes) -> None:
        """Fold in one reply; raise :class:`Refused` for one that must not be used."""
        if party not in self._waiting:
            raise Refused(f"nothing is expected of {party!r}")
        if self._phase == CONTRIBUTE:
            self._fold_term(party, reply)
            self._waiting.remove(party)
            return
        frame = frames.unpack(reply)
        frames.check_address(frame, self._spec.key, self._phase, party)
        fold = {
            ADVERTISE: self._fold_advert,
            SHARE: self._fold_shares,
            AGREE: self._fold_signature,
            UNMASK: self._fold_pieces,
        }[self._phase]
        fold(party, frame)
        self._waiting.remove(party)

    def advance(self) -> Ask | Total:
        """End the phase; raise :class:`SumFailed` or :class:`TooFewSurvivors`."""
        phase, self._phase, silent = self._phase, "", self._waiting
        self._waiting = set()
        for party in silent:  # perhaps it has started anew and knows nobody
            self._session.shown[party].clear()
        if phase == ADVERTISE:
            self._check_count(len(self._ready.adverts))
            return self._ask(SHARE, self._share_asks(self._ready))
        if phase == SHARE:
            self._check_count(len(self._ready.sealed))
            return self._ask_terms(sorted(self._ready.sealed))
        if phase == CONTRIBUTE:
            self._survivors.sort()
            self._check_count(len(self._survivors))
            return self._ask_agreement()
        if phase == AGREE:
            return self._end_agreement()
        if phase == UNMASK:
            return self._open()
        raise SumFailed("this sum is over, or was never started")

    def _check_count(self, count: int) -> None:
        needed = max(2, self._spec.min_survivors)
        if count < needed:
            raise TooFewSurvivors(count, needed)

    def _ask(
        self,
        phase: str,
        payloads: Mapping[str, tuple[Sequence[bytes], Mapping[str, object]]],
        head: Mapping[str, object] | None = None,
    ) -> Ask:
        self._phase, self._waiting = phase, set(payloads)
        key, common = self._spec.key, head or {}
        return Ask(
            phase,
            {
                party: frames.pack({**common, **own, **frames.address(key, phase, party)}, parts)
                for party, (parts, own) in payloads.items()
            },
        )

    # advertise and share, of this round or of the one after it

    def _check_advert(self, key: RoundKey, party: str, data: bytes) -> None:
        """Raise :class:`Refused` for an advert on which its neighbours would stumble."""
        advert = Advert.read(data)
        statement = advert_statement(key, party, advert.body)
        wrapping.verify(self._session.keys[party], advert.signature, statement, party)
        for point in (advert.sealing, advert.masking):
            shared(self._session.probe, point)  # refuses a point that shares no secret

    def _fold_advert(self, party: str, frame: Frame) -> None:
        if len(frame.parts) != 1:
            raise Refused("more or less than one advert")
        self._check_advert(self._ready.key, party, frame.parts[0])
        self._ready.adverts[party] = frame.parts[0]

    def _share_asks(self, ready: Ready) -> dict[str, tuple[Sequence[bytes], Mapping[str, object]]]:
        """Return, for each who advertised, the adverts of its neighbours."""
        gathering = ready.gather()
        names = gathering.names
        digests = b"".join(gathering.digests[name] for name in names)
        asks: dict[str, tuple[Sequence[bytes], Mapping[str, object]]] = {}
        for party in names:
            near = gathering.neighbours(party)
            adverts = [ready.adverts[name] for name in near]
            certificates = [self._session.certificate(party, name) for name in near]
            asks[party] = (
                [digests, *adverts, *certificates],
                {"names": names, "neighbours": near},
            )
        return asks

    def _fold_shares(self, party: str, frame: Frame) -> None:
        _keep_shares(self._ready, party, frame)

    # contribute

    def _ask_terms(self, sharers: Sequence[str]) -> Ask:
        gathering = self._ready.gather()
        self._sharers = list(sharers)
        self._context = sum_context(gathering, self._sharers, self._spec)
        dealt = self._ready.sealed
        pieces = {
            party: [
                dealt[name][party]
                for name in gathering.neighbours(party)
                if name in set(self._sharers)
            ]
            for party in self._sharers
        }
        head = {"gathering": gathering.id.hex(), "sharers": self._sharers}
        return self._ask(CONTRIBUTE, {party: (pieces[party], {}) for party in self._sharers}, head)

    def _fold_term(self, party: str, reply: bytes) -> None:
        """Add a term where it lies: copying it would cost as much."""
        frame = frames.view(reply)
        frames.check_address(frame, self._spec.key, CONTRIBUTE, party)
        if len(frame.parts) != 2:
            raise Refused("a masked term comes with an advert")
        masked, advert = frame.parts
        self._sum.add(masked)
        self._survivors.append(party)
        self._following.adverts[party] = bytes(advert)

    # agree

    def _ask_agreement(self) -> Ask:
        adverts = self._following.adverts
        for party, advert in list(adverts.items()):
            try:
                self._check_advert(self._following.key, party, advert)
            except Refused:
                del adverts[party]
        ahead = self._share_asks(self._following) if len(adverts) > 1 else {}
        key = self._following.key
        parts = {
            party: frames.pack({**head, **frames.address(key, SHARE, party)}, shown)
            for party, (shown, head) in ahead.items()
        }
        head = {"gathering": self._ready.gather().id.hex(), "survivors": self._survivors}
        return self._ask(
            AGREE, {party: ([parts.get(party, b"")], {}) for party in self._survivors}, head
        )

    def _statement(self) -> bytes:
        return agreement.statement(self._spec.key, self._context.hex(), self._survivors)

    def _fold_signature(self, party: str, frame: Frame) -> None:
        if len(frame.parts) != 2:
            raise Refused("an agreement is one signature, and the next round's pieces")
        signature, shares = frame.parts
        wrapping.verify(self._session.keys[party], signature, self._statement(), party)
        self._signatures[party] = signature
        try:
            ahead = frames.unpack(shares)
            frames.check_address(ahead, self._following.key, SHARE, party)
            _keep_shares(self._following, party, ahead)
        except Refused:
            self._session.shown[party].clear()

    def _end_agreement(self) -> Ask:
        needed = agreement.quorum(len(self._sharers), self._spec.min_survivors)
        if len(self._signatures) < needed:
            raise SumFailed(
                f"{len(self._signatures)} of {len(self._sharers)} devices agreed on whose terms "
                f"are in the sum, and opening it needs {needed}"
            )
        self._session.following = self._following
        signers = sorted(self._signatures)[:needed]
        signatures = [self._signatures[name] for name in signers]
        head = {
            "gathering": self._ready.gather().id.hex(),
            "survivors": self._survivors,
            "signers": signers,
        }
        payloads: dict[str, tuple[Sequence[bytes], Mapping[str, object]]] = {}
        for party in self._survivors:
            shown = [self._session.certificate(party, name) for name in signers]
            payloads[party] = ([*signatures, *shown], {})
        return self._ask(UNMASK, payloads, head)

    # unmask

    def _fold_pieces(self, party: str, frame: Frame) -> None:
        holders = self._ready.gather().holders(party)
        if len(frame.parts) != len(holders) or any(
            len(piece) not in {0, shamir.PIECE_BYTES} for piece in frame.parts
        ):
            raise Refused("other pieces than those asked for")
        self._pieces[party] = dict(zip(holders, frame.parts, strict=True))

    def _open(self) -> Total:
        gathering, alive = self._ready.gather(), set(self._survivors)
        masks = []
        for name in self._sharers:
            advert = Advert.read(self._ready.adverts[name])
            if name in alive:
                seed = self._recover(name, advert.commitment, commitment_to)
                masks.append(Mask(seed_mask(seed, self._context), negative=True))
                continue
            near = [other for other in gathering.neighbours(name) if other in alive]
            if near:
                secret = self._recover(name, advert.masking, _public)
                masks += self._masks_with(name, X25519PrivateKey.from_private_bytes(secret), near)
        words = self._sum.words()
        add_masks(words, self._ring, masks)
        return Total(self._ring.unpack(words), tuple(self._survivors))

    def _masks_with(self, gone: str, key: X25519PrivateKey, near: Sequence[str]) -> list[Mask]:
        """Return what takes off the masks that survivors share with a device that is gone."""
        masks = []
        for name in near:
            theirs = Advert.read(self._ready.adverts[name]).masking
            mask = pair_mask(key, theirs, (name, gone), self._context)
            masks.append(Mask(mask.key, negative=not mask.negative))
        return masks

    def _recover(self, owner: str, shown: bytes, shows: Callable[[bytes], bytes]) -> bytes:
        """Return the secret that ``shows`` what the owner had ``shown``, from its pieces.

        Tries again with others, since some may be false.
        """
        gathering = self._ready.gather()
        pieces = [
            (number, self._pieces[holder][owner])
            for number, holder in enumerate(gathering.holders(owner))
            if self._pieces.get(holder, {}).get(owner)
        ]
        enough = gathering.threshold(owner, self._spec.min_survivors)
        if len(pieces) < enough:
            raise SumFailed(
                f"{len(pieces)} devices gave a piece of the mask of {owner!r}, and opening it "
                f"needs {enough}"
            )
        chance = secrets.SystemRandom()
        for _ in range(_TRIES):
            with suppress(Refused):
                found = shamir.combine(dict(chance.sample(pieces, enough)))
                if shows(found) == shown:
                    return found
        raise SumFailed(f"the pieces of the mask of {owner!r} do not fit what it advertised")


def _keep_shares(ready: Ready, party: str, frame: Frame) -> None:
    if party not in ready.gather().digests:
        raise Refused(f"pieces of {party!r}, whose keys nobody has seen")
    near = ready.gather().neighbours(party)
    if len(frame.parts) != len(near):
        raise Refused("pieces for others than the neighbours")
    ready.sealed[party] = dict(zip(near, frame.parts, strict=True))


def _enough_near(gathering: Gathering, party: str, parties: Sequence[str], spec: SumSpec) -> bool:
    present = len(set(gathering.holders(party)) & set(parties))
    return present >= gathering.threshold(party, spec.min_survivors)


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
