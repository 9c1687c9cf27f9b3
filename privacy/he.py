"""A sum whose terms only devices could open, and together agree not to.

All devices of a plan share one BFV key, which one of them, the *dealer*, makes. The hub
relays the key wrapped for each device's certified key and adds what it cannot read.

    deal        one device, once per plan: makes the key, wraps it for everyone in the roster
    contribute  each party encrypts its packed term, under a secret pad in each slot
    agree       each survivor signs the list of survivors, one list a round
    decrypt     two survivors open the sum, independently; they must agree on every integer

What keeps the hub from opening a single term: every slot of a term carries a secret pad, uniform
modulo t, and whoever opens a sum takes off the pads of the survivors listed. In whatever else a hub
has made of the ciphertexts, by adding, leaving out or multiplying, slot by slot, pads are left and
the slot is noise; and it shows, since in each block one slot is empty but for its pad (a wrong
block passes with probability 1/t, about 2**-45). A device opens one sum a round, of at least
``min_survivors`` terms, for a list that a :func:`~atoll.privacy.agreement.quorum` signed. No
device signs two lists for one round.

What it does not do: a hub together with one device's keys opens everything, and a hub whose
authority certifies a device of its own making has one device's keys; no device is kept from
sending a false term, and no hub from subtracting sums over different cohorts.

This module holds what both sides share, and the party's side; :mod:`atoll.privacy.he_hub`
has the hub's.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from atoll.privacy import agreement, bfv, frames, terms, wrapping
from atoll.privacy.errors import BadParameters, Refused
from atoll.privacy.frames import Frame
from atoll.privacy.keystream import Keystream
from atoll.privacy.packing import Layout
from atoll.privacy.sums import CONTRIBUTE, Integers, SumSpec
from atoll.privacy.wrapping import PartyIdentity, PeerLike

DEAL: Final = "deal"
AGREE: Final = "agree"
DECRYPT: Final = "decrypt"

Certificates = Mapping[str, bytes]


def roster_digest(roster: Certificates) -> str:
    """Return what stands for a roster in signed contexts."""
    names = sorted(roster)
    whole = frames.pack({"names": names}, [roster[name] for name in names])
    return hashlib.sha256(whole).hexdigest()


def body_context(run: str, dealer: str, roster: str, plain_bits: int) -> bytes:
    """Return what the encrypted BFV key is bound to."""
    return frames.pack(
        {"what": "key", "run": run, "dealer": dealer, "roster": roster, "plain_bits": plain_bits}
    )


def wrap_context(body: str, recipient: str) -> bytes:
    """Return what a wrapped content key is bound to; ``body`` is :func:`key_id`."""
    return frames.pack({"what": "wrap", "key": body, "recipient": recipient})


def key_id(context: bytes, body: bytes) -> str:
    """Return the name of a dealt key: a digest of it, encrypted, with its context."""
    return hashlib.sha256(frames.pack({}, [context, body])).hexdigest()


@dataclass(frozen=True, slots=True)
class _Held:
    """A key this device holds."""

    run: str
    name: str
    bfv: bfv.Key
    pads: bytes
    peers: Mapping[str, PeerLike]

    def pads_of(self, spec: SumSpec, party: str, blocks: int) -> Integers:
        """Return a party's pads for this sum, int64 ``(blocks, 4096)`` in ``[0, t)``."""
        what = frames.pack(
            {
                **frames.address(spec.key, CONTRIBUTE, party),
                "spec": [spec.length, spec.bound, spec.parties, spec.min_survivors],
            }
        )
        stream = Keystream(hmac.digest(self.pads, what, "sha256"))
        return stream.below(self.bfv.modulus, blocks * bfv.SLOTS).reshape(blocks, bfv.SLOTS)


class HeParty:
    """One party's side; keeps the key between the rounds of a plan."""

    def __init__(self, me: PartyIdentity) -> None:
        self._me = me
        self._held: _Held | None = None
        self._answered = terms.Answered()
        self._signed = agreement.Signed()
        self._opened = agreement.Opened()

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Answer one phase; raise :class:`Refused` for what must not be answered."""
        frame = frames.unpack(payload)
        frames.check_address(frame, spec.key, phase, self._me.party)
        try:
            if phase == DEAL:
                return self._deal(spec, frame)
            if phase == CONTRIBUTE:
                return self._contribute(spec, frame, payload, term)
            if phase == AGREE:
                return self._agree(spec, frame)
            if phase == DECRYPT:
                return self._decrypt(spec, frame, payload)
        except BadParameters as error:
            raise Refused(str(error)) from error
        raise Refused(f"an encrypted sum has no phase {phase!r}")

    def _deal(self, spec: SumSpec, frame: Frame) -> bytes:
        roster, peers = self._roster(frame)
        plain_bits = _plain_bits(frame, roster)
        key = bfv.Key(plain_bits)
        run, me = spec.key.run, self._me
        content = wrapping.fresh_key()
        context = body_context(run, me.party, roster_digest(roster), plain_bits)
        body = wrapping.encrypt(wrapping.derive(content, b"body"), key.secret(), context)
        name = key_id(context, body)
        names = sorted(peers)
        wraps = [
            wrapping.wrap(content, me, peers[party], wrap_context(name, party)) for party in names
        ]
        head = {**frames.address(spec.key, DEAL, me.party), "names": names}
        return frames.pack(head, [body, *wraps])

    def _roster(self, frame: Frame) -> tuple[dict[str, bytes], dict[str, PeerLike]]:
        names = frame.texts("roster")
        if len(set(names)) != len(names) or len(frame.parts) < len(names):
            raise Refused("a roster that repeats a name or lacks a certificate")
        roster = dict(zip(names, frame.parts, strict=False))
        return roster, self._me.peers(roster)

    def _contribute(
        self, spec: SumSpec, frame: Frame, payload: bytes, term: Integers | None
    ) -> bytes:
        before = self._answered.before(spec, payload)
        if before is not None:
            return before
        held = self._take(spec, frame)
        self._check_room(spec, held)
        values = terms.check(term, spec.length, spec.bound)
        layout = Layout.of(spec, held.bfv.plain_bits)
        pads = held.pads_of(spec, self._me.party, layout.blocks)
        padded = _centred((layout.pack(values) + pads) % held.bfv.modulus, held.bfv.modulus)
        blocks = [held.bfv.encrypt(slots) for slots in padded]
        head = {**frames.address(spec.key, CONTRIBUTE, self._me.party), "key": held.name}
        reply = frames.pack(head, blocks)
        self._answered.remember(spec, payload, reply)
        return reply

    def _take(self, spec: SumSpec, frame: Frame) -> _Held:
        """Return the key that ``frame`` names, opening it when it comes along."""
        name = frame.text("key")
        held = self._held
        if held is not None and (held.run, held.name) == (spec.key.run, name):
            return held
        if not frame.parts:
            raise Refused("this device no longer has the run's key; the hub sends it next round")
        roster, peers = self._roster(frame)
        if len(frame.parts) != len(roster) + 2:
            raise Refused("a key must come with its wrapping")
        body, wrapped = frame.parts[-2:]
        dealer, plain_bits = frame.text("dealer"), _plain_bits(frame, roster)
        if dealer not in peers:
            raise Refused(f"a key dealt by {dealer!r}, who is not in the roster")
        context = body_context(spec.key.run, dealer, roster_digest(roster), plain_bits)
        if key_id(context, body) != name:
            raise Refused("a key that is not the one it is said to be")
        content = wrapping.unwrap(
            wrapped, self._me, peers[dealer], wrap_context(name, self._me.party)
        )
        secret = wrapping.decrypt(wrapping.derive(content, b"body"), body, context)
        key = bfv.Key(plain_bits, secret)
        self._held = _Held(spec.key.run, name, key, wrapping.derive(content, b"pads"), peers)
        return self._held

    @staticmethod
    def _check_room(spec: SumSpec, held: _Held) -> None:
        if spec.parties > bfv.max_terms(held.bfv.plain_bits):
            raise Refused(f"{spec.parties} terms are more than this key can add exactly")
        if spec.min_survivors < 2:
            raise Refused("a sum of one term hides nothing; min_survivors must be 2 or more")

    def _in_round(self, spec: SumSpec, frame: Frame) -> tuple[_Held, list[str]]:
        """Check that ``frame`` is about the round this device took part in."""
        held = self._held
        if held is None or self._answered.spec != spec or frame.text("key") != held.name:
            raise Refused("this device has no part in that round")
        survivors = agreement.read_survivors(frame, spec, held.peers)
        if self._me.party not in survivors:
            raise Refused("this device is not among the survivors listed")
        return held, survivors

    def _agree(self, spec: SumSpec, frame: Frame) -> bytes:
        held, survivors = self._in_round(spec, frame)
        statement = agreement.statement(spec.key, held.name, survivors)
        signature = self._signed.sign(self._me, spec.key, statement)
        return frames.pack(frames.address(spec.key, AGREE, self._me.party), [signature])

    def _decrypt(self, spec: SumSpec, frame: Frame, payload: bytes) -> bytes:
        question = hashlib.sha256(payload).digest()
        before = self._opened.before(spec.key, question)
        if before is not None:
            return before
        held, survivors = self._in_round(spec, frame)
        layout = Layout.of(spec, held.bfv.plain_bits)
        signers = frame.texts("signers")
        if len(frame.parts) != len(signers) + layout.blocks:
            raise Refused("a sum with blocks or signatures missing")
        agreement.check_signers(
            agreement.statement(spec.key, held.name, survivors),
            dict(zip(signers, frame.parts, strict=False)),
            survivors,
            agreement.quorum(spec.parties, spec.min_survivors),
            held.peers,
        )
        blocks = frame.parts[len(signers) :]
        slots = np.stack([held.bfv.decrypt(block) for block in blocks])
        for party in survivors:
            # Reduced at each step: the sum of all pads could leave 64 bits.
            slots = (slots - held.pads_of(spec, party, layout.blocks)) % held.bfv.modulus
        values, spare = layout.unpack(_centred(slots, held.bfv.modulus))
        if spare.any():
            raise Refused("a sum that is not the sum of the survivors listed")
        limit = spec.bound * len(survivors)
        reply = frames.pack(
            frames.address(spec.key, DECRYPT, self._me.party),
            [terms.to_bytes(values, spec.length, limit)],
        )
        self._opened.remember(spec.key, question, reply)
        return reply


def _centred(values: Integers, modulus: int) -> Integers:
    """Return the representatives of ``values`` in ``±(modulus-1)/2``."""
    return np.where(values > modulus // 2, values - modulus, values)


def _plain_bits(frame: Frame, roster: Certificates) -> int:
    """Return the size of the plain modulus; raise :class:`Refused` for any but the roster's."""
    named = frame.number("plain_bits")
    if named != bfv.plain_bits_for(len(roster)):
        raise Refused(f"a plain modulus of {named} bits, which is not that of this roster")
    return named
