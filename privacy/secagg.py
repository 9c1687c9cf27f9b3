"""A sum of which nobody sees a term: pairwise masks that cancel, and shares for those who vanish.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS
2017, the variant against an active adversary), with the sparse graph of Bell et al. (CCS 2020)
in large cohorts. The hub relays between devices and trusts are between devices alone: what one
sends another is signed by its certified key, or encrypted under a key that follows from such.

    advertise   two fresh X25519 keys and a commitment to a seed, signed
    share       the seed and one of the private keys, in pieces for the neighbours, encrypted
    contribute  the term under a mask from the own seed and one per pair of neighbours
    agree       each survivor signs the list of survivors, one list a round
    unmask      pieces: of the seed of a survivor, or of the key of a device that vanished

The masks of pairs cancel in the sum; those of seeds are taken off by the hub, which learns the
seeds of survivors, and the key of a device whose term never came: never both of one device, since a
device answers for one list of survivors a round and a majority must have signed it.

In a round after another the first two phases ride along with the former round's, so that a round
takes three messages.

What holds: a hub and fewer than ``threshold`` of a device's neighbours learn nothing of its term
but what the sum tells; a hub that also breaks the protocol must have fewer than ``2 * quorum -
devices`` of all the round's devices on its side (:mod:`atoll.privacy.graph`). Both numbers follow
from ``min_survivors``, which the hub names: whoever runs a device can ask for more
(:class:`atoll.federation.client_app.Floor`). What it does not do: keep a hub that certifies devices
of its own from outnumbering the others, a device from sending a false term or from making a sum
fail, or two sums over different cohorts from being subtracted.

This module holds the party's side, :mod:`atoll.privacy.secagg_hub` the hub's, and
:mod:`atoll.privacy.secagg_keys` what they share. Secrets live for one round and are overwritten
where Python lets us.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from atoll.privacy import agreement, frames, graph, shamir, terms, wrapping
from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.frames import Frame
from atoll.privacy.ring import Mask, Ring
from atoll.privacy.secagg_keys import (
    ADVERTISE,
    Advert,
    Gathering,
    advert_statement,
    commitment_to,
    digest_of,
    pair_mask,
    pair_purpose,
    seed_mask,
    shared,
    sum_context,
)
from atoll.privacy.sums import CONTRIBUTE, Integers, RoundKey, SumSpec
from atoll.privacy.wrapping import PartyIdentity, PeerLike

SHARE: Final = "share"
AGREE: Final = "agree"
UNMASK: Final = "unmask"

_PIECES: Final = 2 * shamir.PIECE_BYTES


@dataclass(slots=True, repr=False)
class _Own:
    """What this device made for a round, and what came of it."""

    party: str
    advert: bytes
    sealing: X25519PrivateKey
    masking: X25519PrivateKey
    masking_secret: bytearray
    seed: bytearray
    gathering: Gathering | None = None
    dealt_for: int = 0
    """The minimum of survivors under which the pieces were dealt."""
    adverts: Mapping[str, Advert] = field(default_factory=dict)
    pieces: dict[str, bytes] = field(default_factory=dict)
    """Of each holder's seed and key, by whose they are; 66 bytes, this device's own included."""
    sharers: Sequence[str] = ()
    context: bytes = b""

    def wipe(self) -> None:
        """Overwrite what must not outlive the round."""
        for secret in (self.seed, self.masking_secret):
            secret[:] = bytes(len(secret))
        self.pieces.clear()


class SecaggParty:
    """One party's side; keeps who its peers are between the rounds of a plan."""

    def __init__(self, me: PartyIdentity) -> None:
        self._me = me
        self._peers: dict[str, PeerLike] = {}
        self._own: dict[RoundKey, _Own] = {}
        self._answered = terms.Answered()
        self._signed = agreement.Signed()
        self._opened = agreement.Opened()

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Answer one phase; raise :class:`Refused` for what must not be answered."""
        frame = frames.unpack(payload)
        frames.check_address(frame, spec.key, phase, self._me.party)
        try:
            if phase == ADVERTISE:
                return self._reply(spec.key, ADVERTISE, [self._advertise(spec.key)])
            if phase == SHARE:
                return self._share(spec.key, spec, frame)
            if phase == CONTRIBUTE:
                return self._contribute(spec, frame, payload, term)
            if phase == AGREE:
                return self._agree(spec, frame)
            if phase == UNMASK:
                return self._unmask(spec, frame, payload)
        except BadParameters as error:
            raise Refused(str(error)) from error
        raise Refused(f"a masked sum has no phase {phase!r}")

    def _reply(self, key: RoundKey, phase: str, parts: Sequence[bytes | bytearray]) -> bytes:
        return frames.pack(frames.address(key, phase, self._me.party), parts)

    # advertise

    def _advertise(self, key: RoundKey) -> bytes:
        """Make this device's keys for a round, anew each time it is asked; return the advert."""
        last = self._answered.spec
        if last is not None and last.key.run == key.run and last.key.round >= key.round:
            raise Refused(f"round {key.round} of run {key.run} has been answered already")
        for old in [
            held for held in self._own if held.run != key.run or held.round <= key.round - 2
        ]:
            self._own.pop(old).wipe()
        sealing, masking = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        seed = bytearray(wrapping.fresh_key())
        body = (
            sealing.public_key().public_bytes_raw()
            + masking.public_key().public_bytes_raw()
            + commitment_to(bytes(seed))
        )
        signature = wrapping.sign(self._me.key, advert_statement(key, self._me.party, body))
        secret = bytearray(masking.private_bytes_raw())
        self._own[key] = _Own(self._me.party, body + signature, sealing, masking, secret, seed)
        return body + signature

    # share

    def _share(self, key: RoundKey, spec: SumSpec, frame: Frame) -> bytes:
        own = self._own.get(key)
        if own is None or own.gathering is not None:
            raise Refused("this device has advertised nothing for that round, or shared already")
        gathering = _read_gathering(key, frame)
        if gathering.digests.get(self._me.party) != digest_of(own.advert):
            raise Refused("this device's own advert is not among those shown")
        near = gathering.neighbours(self._me.party)
        if frame.texts("neighbours") != near or len(frame.parts) != 1 + 2 * len(near):
            raise Refused("adverts of others than this device's neighbours")
        adverts = {}
        for name, data, certificate in zip(
            near, frame.parts[1 : 1 + len(near)], frame.parts[1 + len(near) :], strict=True
        ):
            if digest_of(data) != gathering.digests[name]:
                raise Refused(f"an advert of {name!r} that is not the one everybody sees")
            adverts[name] = Advert.read(data)
            adverts[name].check(key, name, self._peer(name, certificate))
        own.gathering, own.adverts, own.dealt_for = gathering, adverts, spec.min_survivors
        return self._reply(key, SHARE, self._deal(own, gathering, spec))

    def _peer(self, name: str, certificate: bytes) -> PeerLike:
        if certificate:
            self._peers[name] = self._me.peer(name, certificate)
        if name not in self._peers:
            raise Refused(f"the certificate of {name!r} was not shown")
        return self._peers[name]

    def _deal(self, own: _Own, gathering: Gathering, spec: SumSpec) -> list[bytes]:
        """Return this device's pieces, encrypted, for each neighbour in order."""
        me = self._me.party
        holders = gathering.holders(me)
        enough = gathering.threshold(me, spec.min_survivors)
        pairs = zip(
            shamir.split(bytes(own.seed), len(holders), enough),
            shamir.split(bytes(own.masking_secret), len(holders), enough),
            strict=True,
        )
        sealed = []
        for holder, (of_seed, of_key) in zip(holders, pairs, strict=True):
            pieces = of_seed + of_key
            if holder == me:
                own.pieces[me] = pieces
            else:
                key, context = _seal(own, own.adverts[holder], (me, holder), gathering)
                sealed.append(wrapping.encrypt(key, pieces, context))
        return sealed

    # contribute

    def _contribute(
        self, spec: SumSpec, frame: Frame, payload: bytes, term: Integers | None
    ) -> bytes:
        before = self._answered.before(spec, payload)
        if before is not None:
            return before
        own, gathering = self._mine(spec.key, frame)
        if own.dealt_for != spec.min_survivors:
            raise Refused("this device's pieces were dealt for another minimum of survivors")
        sharers = frame.texts("sharers")
        near = self._check_sharers(spec, gathering, sharers)
        if len(frame.parts) != len(near):
            raise Refused("pieces of others than this device's neighbours")
        values = terms.check(term, spec.length, spec.bound)
        ring = Ring.of(spec)
        for name, sealed in zip(near, frame.parts, strict=True):
            key, context = _seal(own, own.adverts[name], (name, self._me.party), gathering)
            try:
                pieces = wrapping.decrypt(key, sealed, context)
            except Refused:
                continue  # who deals what cannot be read gets no piece back from this device
            if len(pieces) == _PIECES:
                own.pieces[name] = pieces
        own.sharers, own.context = tuple(sharers), sum_context(gathering, sharers, spec)
        masks = [Mask(seed_mask(bytes(own.seed), own.context)), *_pairs(own, near)]
        masked = ring.masked(values, masks)
        following = RoundKey(spec.key.run, spec.key.round + 1)
        reply = self._reply(spec.key, CONTRIBUTE, [masked, self._advertise(following)])
        self._answered.remember(spec, payload, reply)
        return reply

    def _mine(self, key: RoundKey, frame: Frame) -> tuple[_Own, Gathering]:
        own = self._own.get(key)
        if own is None or own.gathering is None:
            raise Refused("this device has shared nothing for that round")
        if frame.text("gathering") != own.gathering.id.hex():
            raise Refused("another gathering than the one this device shared its secrets in")
        return own, own.gathering

    def _check_sharers(
        self, spec: SumSpec, gathering: Gathering, sharers: Sequence[str]
    ) -> list[str]:
        """Return this device's neighbours among ``sharers``; raise when it must not go on."""
        me = self._me.party
        if sharers != sorted(set(sharers)) or not {me} <= set(sharers) <= gathering.digests.keys():
            raise Refused("a list of devices that repeats, names strangers or leaves out this one")
        if not max(2, spec.min_survivors) <= len(sharers) <= spec.parties:
            raise Refused(f"{len(sharers)} devices are too few, or too many, to be hidden among")
        near = [name for name in gathering.neighbours(me) if name in set(sharers)]
        if 1 + len(near) < gathering.threshold(me, spec.min_survivors):
            raise Refused("too few neighbours are left to open this device's mask")
        return near

    # agree

    def _in_round(self, spec: SumSpec, frame: Frame) -> tuple[_Own, Gathering, list[str]]:
        """Check that ``frame`` is about the round this device took part in."""
        if self._answered.spec != spec:
            raise Refused("this device has no part in that round")
        own, gathering = self._mine(spec.key, frame)
        survivors = agreement.read_survivors(frame, spec, own.sharers)
        if self._me.party not in survivors:
            raise Refused("this device is not among the survivors listed")
        return own, gathering, survivors

    def _agree(self, spec: SumSpec, frame: Frame) -> bytes:
        own, gathering, survivors = self._in_round(spec, frame)
        if len(frame.parts) != 1:
            raise Refused("more or less than the next round's adverts")
        if not graph.connected(gathering.near, survivors):
            raise Refused("survivors whose masks fall into parts, each of which could be opened")
        statement = agreement.statement(spec.key, own.context.hex(), survivors)
        signature = self._signed.sign(self._me, spec.key, statement)
        shared = b""
        if frame.parts[0]:
            following = RoundKey(spec.key.run, spec.key.round + 1)
            ahead = frames.unpack(frame.parts[0])
            frames.check_address(ahead, following, SHARE, self._me.party)
            try:
                shared = self._share(following, spec, ahead)
            except Refused:
                shared = b""  # the next round can begin anew; this one goes on
        return self._reply(spec.key, AGREE, [signature, shared])

    # unmask

    def _unmask(self, spec: SumSpec, frame: Frame, payload: bytes) -> bytes:
        question = hashlib.sha256(payload).digest()
        before = self._opened.before(spec.key, question)
        if before is not None:
            return before
        own, gathering, survivors = self._in_round(spec, frame)
        signers = frame.texts("signers")
        if len(frame.parts) != 2 * len(signers):
            raise Refused("signatures missing")
        me = self._me.party
        statement = agreement.statement(spec.key, own.context.hex(), survivors)
        signatures = dict(zip(signers, frame.parts, strict=False))
        # Whether it signed itself a device knows without looking.
        signatures.pop(me, None)
        for name, certificate in zip(signers, frame.parts[len(signers) :], strict=True):
            if certificate and name != me:
                self._peer(name, certificate)
        agreement.check_signers(
            statement,
            signatures,
            survivors,
            agreement.quorum(len(own.sharers), spec.min_survivors)
            - self._signed.has(spec.key, statement),
            self._peers,
        )
        alive = set(survivors)
        pieces = [
            _piece(own.pieces.get(name, b""), seed=name in alive) for name in gathering.holders(me)
        ]
        reply = self._reply(spec.key, UNMASK, pieces)
        self._opened.remember(spec.key, question, reply)
        self._own.pop(spec.key).wipe()
        return reply


def _read_gathering(key: RoundKey, frame: Frame) -> Gathering:
    names = frame.texts("names")
    size = hashlib.sha256().digest_size
    if names != sorted(set(names)) or not frame.parts or len(frame.parts[0]) != size * len(names):
        raise Refused("a list of adverts that repeats a device or lacks a digest")
    whole = frame.parts[0]
    digests = {name: whole[at * size : (at + 1) * size] for at, name in enumerate(names)}
    return Gathering(key, digests)


def _seal(
    own: _Own, other: Advert, pair: tuple[str, str], gathering: Gathering
) -> tuple[bytes, bytes]:
    """Return the key and the context under which the first of a pair deals to the second."""
    context = frames.pack({"what": "pieces", "pair": list(pair)}, [gathering.id])
    secret = shared(own.sealing, other.sealing)
    return wrapping.derive(secret, pair_purpose(b"pieces ", pair), gathering.id), context


def _pairs(own: _Own, near: Sequence[str]) -> list[Mask]:
    """Return the masks that this device shares with its neighbours, as it adds them."""
    return [
        pair_mask(own.masking, own.adverts[name].masking, (own.party, name), own.context)
        for name in near
    ]


def _piece(pieces: bytes, *, seed: bool) -> bytes:
    """Return the one piece of a neighbour's two that may be told; none of none."""
    return pieces[: shamir.PIECE_BYTES] if seed else pieces[shamir.PIECE_BYTES :]
