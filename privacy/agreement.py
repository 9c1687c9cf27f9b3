"""Devices sign whose terms are in a sum, so that no two of them open different sums of a round.

Each device signs one list of survivors a round. A sum is opened for a list that enough of them
signed; with enough being a majority, two lists of one round cannot both have it.
"""

from collections.abc import Collection, Mapping, Sequence

from atoll.privacy import frames, wrapping
from atoll.privacy.errors import Refused
from atoll.privacy.frames import Frame
from atoll.privacy.sums import RoundKey, SumSpec
from atoll.privacy.wrapping import PartyIdentity, PeerLike


def quorum(sharers: int, min_survivors: int) -> int:
    """Return how many of a round's devices must sign a list of survivors.

    More than half, and as many as must survive. Two lists of a round can both be signed only if
    ``2 * quorum - sharers`` devices sign both, which an honest one does not.
    """
    return max(sharers // 2 + 1, min(min_survivors, sharers))


def statement(key: RoundKey, bound: str, survivors: Sequence[str]) -> bytes:
    """Return what survivors sign; ``bound`` names the keys of the sum."""
    return frames.pack(
        {
            "what": "survivors",
            "run": key.run,
            "round": key.round,
            "key": bound,
            "survivors": sorted(survivors),
        }
    )


def read_survivors(frame: Frame, spec: SumSpec, parties: Collection[str]) -> list[str]:
    """Return the survivors a frame names; raise :class:`Refused` for a list not to be opened."""
    survivors = frame.texts("survivors")
    if survivors != sorted(set(survivors)) or not set(survivors) <= set(parties):
        raise Refused("a list of survivors that repeats, is out of order or names strangers")
    if not max(2, spec.min_survivors) <= len(survivors) <= spec.parties:
        raise Refused(
            f"a sum of {len(survivors)} terms, where {spec.min_survivors} to {spec.parties} "
            "are to be hidden in each other"
        )
    return survivors


def check_signers(
    statement: bytes,
    signatures: Mapping[str, bytes],
    survivors: Collection[str],
    needed: int,
    peers: Mapping[str, PeerLike],
) -> None:
    """Raise :class:`Refused` unless ``needed`` of the survivors signed ``statement``."""
    if len(signatures) < needed or not set(signatures) <= set(survivors):
        raise Refused("too few of the survivors agreed on who they are")
    for party, signature in signatures.items():
        if party not in peers:
            raise Refused(f"no certificate was shown for {party!r}, who is said to have signed")
        wrapping.verify(peers[party].key, signature, statement, party)


class Signed:
    """What a device has signed last; it signs one list a round."""

    def __init__(self) -> None:
        self._last: tuple[RoundKey, bytes] | None = None

    def sign(self, me: PartyIdentity, key: RoundKey, statement: bytes) -> bytes:
        """Return the signature; raise :class:`Refused` for a second list in a round."""
        if self._last is not None and self._last[0] == key and self._last[1] != statement:
            raise Refused("this device has signed another list of survivors for that round")
        self._last = (key, statement)
        return wrapping.sign(me.key, statement)

    def has(self, key: RoundKey, statement: bytes) -> bool:
        """Tell whether this device signed ``statement``."""
        return self._last == (key, statement)


class Opened:
    """What a device has opened last; it opens one sum a round.

    The same question gets the same bytes, any other of that round none.
    """

    def __init__(self) -> None:
        self._last: tuple[RoundKey, bytes, bytes] | None = None

    def before(self, key: RoundKey, question: bytes) -> bytes | None:
        """Return what was answered, or none when nothing was; raise :class:`Refused`."""
        if self._last is None or self._last[0] != key:
            return None
        if self._last[1] == question:
            return self._last[2]
        raise Refused("this device opens one sum a round")

    def remember(self, key: RoundKey, question: bytes, reply: bytes) -> None:
        """Keep ``reply`` as the answer to ``question`` (or its digest)."""
        self._last = (key, question, reply)
