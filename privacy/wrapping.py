"""One key for many certified devices, carried by somebody who must not read it.

The dealer draws a content key and, for each recipient, derives a one-time AES key from an
ephemeral X25519 exchange with the recipient's certified key (HKDF-SHA256), encrypts the
content key with it (AES-256-GCM) and signs the result with its own certified key (ECDSA,
SHA-384). The *context*, which names run, dealer, recipient and roster, enters all three, so
nothing can be moved to another run, recipient or roster.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atoll.privacy.errors import Refused

_POINT: Final = 32
_KEY: Final = 32
_SEALED: Final = _POINT + _KEY + 16  # ephemeral key, content key, GCM tag
_ONCE: Final = bytes(12)  # a nonce may be constant where its key encrypts once
_SIGNING: Final = ec.ECDSA(hashes.SHA384())


class PeerLike(Protocol):
    """What a certificate says of its holder."""

    @property
    def device(self) -> str:
        """The party's name."""
        ...

    @property
    def key(self) -> ec.EllipticCurvePublicKey:
        """Verifies its signatures."""
        ...

    @property
    def seal(self) -> X25519PublicKey:
        """Receives wrapped keys."""
        ...


@dataclass(frozen=True, slots=True)
class PartyIdentity:
    """A party's name and keys, and how it tells who another party is.

    ``peer_of`` takes a certificate (PEM) and returns whom it certifies; it raises whatever it
    likes for a certificate that is not from the party's own authority, or no longer valid.
    """

    party: str
    key: ec.EllipticCurvePrivateKey
    seal: X25519PrivateKey
    peer_of: Callable[[bytes], PeerLike]

    def peer(self, party: str, certificate: bytes) -> PeerLike:
        """Return who ``party`` is; raise :class:`Refused` unless the certificate says so."""
        try:
            peer = self.peer_of(certificate)
        except Exception as error:
            # Whatever the caller's check raises, this certificate must not be used.
            raise Refused(f"the certificate shown for {party!r} is not valid") from error
        if peer.device != party:
            raise Refused(f"the certificate shown for {party!r} is that of {peer.device!r}")
        return peer

    def peers(self, roster: Mapping[str, bytes]) -> dict[str, PeerLike]:
        """Return who everybody is; raise :class:`Refused` unless all of them are certified."""
        peers = {party: self.peer(party, certificate) for party, certificate in roster.items()}
        mine = peers.get(self.party)
        if (
            mine is None
            or mine.seal.public_bytes_raw() != self.seal.public_key().public_bytes_raw()
        ):
            raise Refused("this device's own certificate is not in the roster it was shown")
        return peers


def fresh_key() -> bytes:
    """Return a new content key."""
    return os.urandom(_KEY)


def derive(secret: bytes, purpose: bytes, salt: bytes = b"") -> bytes:
    """Return 32 bytes for one ``purpose``."""
    return HKDF(hashes.SHA256(), _KEY, salt, b"atoll " + purpose).derive(secret)


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Sign ``message``."""
    return key.sign(message, _SIGNING)


def certified_key(certificate: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key in a certificate (PEM) that is trusted already; raise :class:`Refused`."""
    try:
        key = x509.load_pem_x509_certificate(certificate).public_key()
    except ValueError as error:
        raise Refused("a certificate that cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Refused("a certificate of another kind of key")
    return key


def verify(key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes, who: str) -> None:
    """Raise :class:`Refused` unless ``who`` signed ``message``."""
    try:
        key.verify(signature, message, _SIGNING)
    except InvalidSignature as error:
        raise Refused(f"a signature that {who!r} did not make") from error


def wrap(content_key: bytes, dealer: PartyIdentity, recipient: PeerLike, context: bytes) -> bytes:
    """Return ``content_key`` (32 bytes) for ``recipient`` alone, signed by ``dealer``."""
    once = X25519PrivateKey.generate()
    point = once.public_key().public_bytes_raw()
    receiver = recipient.seal.public_bytes_raw()
    key = derive(once.exchange(recipient.seal), b"wrap " + context, point + receiver)
    sealed = point + AESGCM(key).encrypt(_ONCE, content_key, context)
    return sealed + sign(dealer.key, context + sealed)


def unwrap(wrapped: bytes, me: PartyIdentity, dealer: PeerLike, context: bytes) -> bytes:
    """Return the content key; raise :class:`Refused` when any of it does not hold."""
    sealed, signature = wrapped[:_SEALED], wrapped[_SEALED:]
    verify(dealer.key, signature, context + sealed, dealer.device)
    try:
        point = X25519PublicKey.from_public_bytes(sealed[:_POINT])
        receiver = me.seal.public_key().public_bytes_raw()
        key = derive(me.seal.exchange(point), b"wrap " + context, sealed[:_POINT] + receiver)
        return AESGCM(key).decrypt(_ONCE, sealed[_POINT:], context)
    except (ValueError, InvalidTag) as error:
        raise Refused(f"a key that {dealer.device!r} did not wrap for this device") from error


def encrypt(key: bytes, data: bytes, context: bytes) -> bytes:
    """Encrypt under a key that encrypts nothing else."""
    return AESGCM(key).encrypt(_ONCE, data, context)


def decrypt(key: bytes, data: bytes, context: bytes) -> bytes:
    """Undo :func:`encrypt`; raise :class:`Refused` for data that were changed."""
    try:
        return AESGCM(key).decrypt(_ONCE, data, context)
    except InvalidTag as error:
        raise Refused("encrypted bytes that were changed on the way") from error
