"""The keys of a masked sum (:mod:`atoll.privacy.secagg`): who shows what, and what follows from it.

Both sides agree here: devices make masks and pieces of these keys, and the hub takes masks off by
them when it has been given the secrets.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from atoll.privacy import frames, graph, wrapping
from atoll.privacy.errors import Refused
from atoll.privacy.ring import Mask
from atoll.privacy.sums import RoundKey, SumSpec
from atoll.privacy.wrapping import PeerLike

ADVERTISE: Final = "advertise"

_KEY: Final = 32


class Advert(NamedTuple):
    """What a device publishes for a round: keys for pieces and for masks, and its commitment."""

    sealing: bytes
    masking: bytes
    commitment: bytes
    signature: bytes

    @property
    def body(self) -> bytes:
        """What is signed."""
        return self.sealing + self.masking + self.commitment

    @classmethod
    def read(cls, data: bytes) -> "Advert":
        """Take an advert apart; raise :class:`Refused` for bytes that are none."""
        if len(data) <= 3 * _KEY:
            raise Refused("an advert cut short")
        return cls(data[:_KEY], data[_KEY : 2 * _KEY], data[2 * _KEY : 3 * _KEY], data[3 * _KEY :])

    def write(self) -> bytes:
        """Return its bytes."""
        return self.body + self.signature

    def check(self, key: RoundKey, party: str, peer: PeerLike) -> None:
        """Raise :class:`Refused` unless ``party`` signed this for this round."""
        wrapping.verify(peer.key, self.signature, advert_statement(key, party, self.body), party)


def advert_statement(key: RoundKey, party: str, body: bytes) -> bytes:
    """Return what a device signs of its keys."""
    return frames.pack({"what": "advert", **frames.address(key, ADVERTISE, party)}, [body])


@dataclass(frozen=True, slots=True)
class Gathering:
    """Who advertised what in a round, as everybody must see it: by digests of the adverts."""

    key: RoundKey
    digests: Mapping[str, bytes]

    @property
    def names(self) -> list[str]:
        """Who advertised, sorted."""
        return sorted(self.digests)

    @property
    def id(self) -> bytes:
        """Stands for all of it in keys and signatures."""
        names = self.names
        head = {"what": "gathering", "run": self.key.run, "round": self.key.round, "names": names}
        whole = frames.pack(head, [self.digests[name] for name in names])
        return hashlib.sha256(whole).digest()

    @property
    def near(self) -> graph.Neighbours:
        """Return who exchanges pieces and masks with whom."""
        return _graph(tuple(self.names), self.id)

    def neighbours(self, party: str) -> list[str]:
        """Return who exchanges pieces and masks with ``party``, sorted."""
        return list(self.near[party])

    def threshold(self, party: str, min_survivors: int) -> int:
        """Return how many of its holders open a secret of ``party``."""
        return graph.threshold(len(self.holders(party)), len(self.digests), min_survivors)

    def holders(self, party: str) -> list[str]:
        """Return who holds the pieces of ``party``'s secrets: its neighbours and itself."""
        return sorted([party, *self.neighbours(party)])


@lru_cache(maxsize=4)
def _graph(names: tuple[str, ...], seed: bytes) -> graph.Neighbours:
    return graph.neighbours(names, seed)


def digest_of(advert: bytes) -> bytes:
    """Return what stands for an advert in a :class:`Gathering`."""
    return hashlib.sha256(advert).digest()


def commitment_to(seed: bytes) -> bytes:
    """Return what a device publishes of its seed beforehand."""
    return wrapping.derive(seed, b"commitment")


def seed_mask(seed: bytes, context: bytes) -> bytes:
    """Return the key of the mask that a device's own seed makes."""
    return wrapping.derive(seed, b"own mask " + context)


def pair_mask(mine: X25519PrivateKey, theirs: bytes, pair: Sequence[str], context: bytes) -> Mask:
    """Return the mask of a pair as its first (by name) adds it; ``pair`` is (own, other).

    Raises :class:`Refused` for a public key that is none.
    """
    key = wrapping.derive(shared(mine, theirs), pair_purpose(b"pair mask ", sorted(pair)), context)
    return Mask(key, negative=pair[0] > pair[1])


def sum_context(gathering: Gathering, sharers: Sequence[str], spec: SumSpec) -> bytes:
    """Return what every mask of a sum is bound to: round, adverts, who shared, and the spec."""
    head = {
        "what": "sum",
        "sharers": list(sharers),
        "spec": [spec.length, spec.bound, spec.parties, spec.min_survivors],
    }
    return hashlib.sha256(frames.pack(head, [gathering.id])).digest()


def shared(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    """Return the secret of two keys; raise :class:`Refused` for a public key that is none."""
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise Refused("a public key that is none") from error


def pair_purpose(what: bytes, pair: Sequence[str]) -> bytes:
    """Return what a key of two devices is for."""
    return what + frames.pack({"pair": list(pair)})
