"""Who is who: a device's keys, and what its certificate proves.

A device holds two keys. ``key`` (EC P-384) is its TLS client key, its Flower node key and its
signature key. ``seal`` (X25519) receives keys that others wrap for it. Both are certified by
one X.509 certificate (RFC 5280): the first as the subject key, the second as a URI in the
subjectAltName, so whoever has the certificate can wrap a key for the device.

The subject is exactly ``CN=<device>``; brokers map it to a user. Of a certificate request
nothing is believed but these two keys; the request's signature proves possession of the first.

**Wrong clocks.** Many devices have no clock that survives power-off and start hours behind.
A certificate that is new to the hub would be "not yet valid" to them, so every certificate is
back-dated by :data:`BACKDATE`; the authority's own by a year. Device certificates are judged
by the hub's clock alone. A device clock that runs far ahead sees the hub's certificate as
expired; hub certificates therefore live long (:data:`SERVER_LIFE`), device certificates short.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from atoll.fleet.authority import (
    BACKDATE,
    DEVICE_LIFE,
    HUB_SERVICE,
    SERVER_LIFE,
    Authority,
)
from atoll.fleet.certificates import (
    device_named,
    fingerprint,
    load_key,
    load_private,
    p384,
    private_pem,
    public_pem,
    read_certificate,
    seal_in,
    seal_uri,
    subject,
)
from atoll.fleet.errors import BadIdentity
from atoll.fleet.files import write_atomic
from atoll.fleet.topics import check_device_id

__all__ = [
    "BACKDATE",
    "DEVICE_LIFE",
    "HUB_SERVICE",
    "SERVER_LIFE",
    "Authority",
    "Identity",
    "Peer",
    "fingerprint",
    "load_key",
    "peer_of",
    "public_pem",
    "read_certificate",
    "renew_due",
]


@dataclass(frozen=True, slots=True)
class Identity:
    """A device's private keys; they are made on the device and never leave it."""

    key: ec.EllipticCurvePrivateKey
    seal: X25519PrivateKey

    @classmethod
    def new(cls) -> "Identity":
        """Make fresh keys."""
        return cls(ec.generate_private_key(ec.SECP384R1()), X25519PrivateKey.generate())

    def save(self, directory: Path) -> None:
        """Write ``key.pem`` and ``seal.pem``, readable by the owner alone."""
        write_atomic(directory / "key.pem", private_pem(self.key))
        write_atomic(directory / "seal.pem", private_pem(self.seal))

    @classmethod
    def load(cls, directory: Path) -> "Identity":
        """Read what :meth:`save` wrote; raise :class:`BadIdentity` when it is not there."""
        key = load_key(directory / "key.pem")
        seal = load_private(directory / "seal.pem")
        if not isinstance(seal, X25519PrivateKey):
            raise BadIdentity(f"{directory / 'seal.pem'} holds no X25519 key; enrol again")
        return cls(key, seal)

    def public_pem(self) -> bytes:
        """Return the public half of ``key``, as registered with the SuperLink."""
        return public_pem(self.key.public_key())

    def csr(self, device: str) -> bytes:
        """Return a certificate request in PEM for both keys."""
        uri = x509.UniformResourceIdentifier(seal_uri(self.seal.public_key()))
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(subject(check_device_id(device)))
            .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        )
        return request.sign(self.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class Peer:
    """What a device certificate proves."""

    device: str
    serial: str
    """Hexadecimal, lower case, without prefix."""
    key: ec.EllipticCurvePublicKey
    seal: X25519PublicKey
    not_after: datetime


def peer_of(cert_pem: bytes, ca_pem: bytes, now: datetime) -> Peer:
    """Check a device certificate against the authority and return whom it names.

    The chain, the validity at ``now`` (aware), key usages and names are checked; revocation is
    not, it is the hub's register that knows. Raises :class:`BadIdentity`.
    """
    cert = read_certificate(cert_pem)
    verifier = PolicyBuilder().store(Store([read_certificate(ca_pem)])).time(now)
    try:
        verifier.build_client_verifier().verify(cert, [])
    except VerificationError as error:
        if not cert.not_valid_before_utc <= now <= cert.not_valid_after_utc:
            raise BadIdentity(
                f"certificate is valid from {cert.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{cert.not_valid_after_utc:%Y-%m-%d %H:%M} UTC and it is now "
                f"{now:%Y-%m-%d %H:%M}; check the clock, then enrol again"
            ) from error
        raise BadIdentity(f"not a device certificate of this hub: {error}") from error
    try:
        san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise BadIdentity("certificate carries no sealing key; enrol again") from error
    return Peer(
        device_named(cert.subject),
        f"{cert.serial_number:x}",
        p384(cert.public_key()),
        seal_in(san),
        cert.not_valid_after_utc,
    )


def renew_due(cert_pem: bytes, now: datetime) -> bool:
    """Tell whether two thirds of the life are over, counted from issue.

    A third remains for tries that fail. Raises :class:`BadIdentity`.
    """
    cert = read_certificate(cert_pem)
    issued = cert.not_valid_before_utc + BACKDATE
    return now >= issued + (cert.not_valid_after_utc - issued) * 2 / 3
