"""Who is who: device keys, the hub's certificate authority, and what a certificate proves.

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

import ipaddress
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from atoll.fleet.errors import BadIdentity
from atoll.fleet.files import PUBLIC, write_atomic
from atoll.fleet.topics import DEVICE_ID, check_device_id
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

BACKDATE: Final = timedelta(hours=24)
DEVICE_LIFE: Final = timedelta(days=30)
SERVER_LIFE: Final = timedelta(days=365)
AUTHORITY_LIFE: Final = timedelta(days=20 * 365)
AUTHORITY_BACKDATE: Final = timedelta(days=365)

SEAL_URN: Final = "urn:atoll:x25519:"
HUB_SERVICE: Final = "_hub"
"""Name of the hub's own client certificate: no device can be called so."""

_SERVER_NAME: Final = "Atoll hub"
_SERVICE_NAME: Final = re.compile(r"_[a-z0-9-]{1,62}")


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
        write_atomic(directory / "key.pem", _private_pem(self.key))
        write_atomic(directory / "seal.pem", _private_pem(self.seal))

    @classmethod
    def load(cls, directory: Path) -> "Identity":
        """Read what :meth:`save` wrote; raise :class:`BadIdentity` when it is not there."""
        key = load_key(directory / "key.pem")
        seal = _load_private(directory / "seal.pem")
        if not isinstance(seal, X25519PrivateKey):
            raise BadIdentity(f"{directory / 'seal.pem'} holds no X25519 key; enrol again")
        return cls(key, seal)

    def public_pem(self) -> bytes:
        """Return the public half of ``key``, as registered with the SuperLink."""
        return public_pem(self.key.public_key())

    def csr(self, device: str) -> bytes:
        """Return a certificate request in PEM for both keys."""
        request = x509.CertificateSigningRequestBuilder(
            _name(check_device_id(device)),
            [x509.Extension(x509.SubjectAlternativeName.oid, False, _seal_name(self.seal))],  # noqa: FBT003 -- not our signature: (oid, critical, value)
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
        _device_named(cert.subject),
        f"{cert.serial_number:x}",
        _p384(cert.public_key()),
        _seal_in(san),
        cert.not_valid_after_utc,
    )


def renew_due(cert_pem: bytes, now: datetime) -> bool:
    """Tell whether two thirds of the life are over, counted from issue.

    A third remains for tries that fail. Raises :class:`BadIdentity`.
    """
    cert = read_certificate(cert_pem)
    issued = cert.not_valid_before_utc + BACKDATE
    return now >= issued + (cert.not_valid_after_utc - issued) * 2 / 3


@dataclass(frozen=True, slots=True)
class Authority:
    """The hub's certificate authority: a self-signed root that issues leaves directly."""

    key: ec.EllipticCurvePrivateKey
    cert: x509.Certificate

    @classmethod
    def create(cls, name: str, now: datetime) -> "Authority":
        """Make a root called ``name``; ``now`` is aware."""
        key = ec.generate_private_key(ec.SECP384R1())
        builder = (
            x509.CertificateBuilder(_name(name), _name(name), key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - AUTHORITY_BACKDATE)
            .not_valid_after(now + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)  # noqa: FBT003 -- not our signature
        )
        return cls(key, builder.sign(key, hashes.SHA384()))

    @property
    def cert_pem(self) -> bytes:
        """The root certificate."""
        return self.cert.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, in hexadecimal; enrolment tokens carry it."""
        return self.cert.fingerprint(hashes.SHA256()).hex()

    def save(self, directory: Path) -> None:
        """Write ``key.pem`` (private) and ``cert.pem``."""
        write_atomic(directory / "key.pem", _private_pem(self.key))
        write_atomic(directory / "cert.pem", self.cert_pem, PUBLIC)

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """Read what :meth:`save` wrote; raise :class:`BadIdentity` when it is not whole."""
        key = load_key(directory / "key.pem")
        cert = read_certificate(_read(directory / "cert.pem"))
        if cert.public_key() != key.public_key():
            raise BadIdentity(
                f"key.pem and cert.pem in {directory} do not belong together; restore both "
                "from one backup"
            )
        return cls(key, cert)

    def issue_device(
        self, csr_pem: bytes, device: str, now: datetime, life: timedelta = DEVICE_LIFE
    ) -> bytes:
        """Return a certificate for ``device`` over the request's two keys.

        The caller decides which device is asking. Raises :class:`BadIdentity` for a request
        that is malformed, not signed by its own key, or without a usable sealing key.
        """
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
            signed = csr.is_signature_valid
            san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, TypeError, x509.ExtensionNotFound, InvalidSignature) as error:
            raise BadIdentity(f"not a certificate request of ours: {error}") from error
        if not signed:
            raise BadIdentity("certificate request is not signed by the key it names")
        seal = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(_seal_uri(_seal_in(san)))]
        )
        subject = _name(check_device_id(device))
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._issue(subject, _p384(csr.public_key()), usage, seal, now, life)

    def issue_server(
        self,
        names: Sequence[str],
        ips: Sequence[str],
        now: datetime,
        life: timedelta = SERVER_LIFE,
    ) -> tuple[bytes, bytes]:
        """Return (key PEM, certificate PEM) for a server reached under ``names`` and ``ips``.

        Raises :class:`BadIdentity` for a name or address that cannot stand in a certificate.
        """
        try:
            san = x509.SubjectAlternativeName(
                [
                    *(x509.DNSName(name) for name in names),
                    *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips),
                ]
            )
        except ValueError as error:
            raise BadIdentity(f"cannot name a server so: {error}") from error
        return self._issue_own(_SERVER_NAME, ExtendedKeyUsageOID.SERVER_AUTH, san, now, life)

    def issue_service(
        self, name: str, now: datetime, life: timedelta = SERVER_LIFE
    ) -> tuple[bytes, bytes]:
        """Return (key PEM, certificate PEM) of a client of the hub's own, ``CN=name``.

        ``name`` begins with ``_`` (see :data:`HUB_SERVICE`), so that no device can enrol
        under it and inherit its permissions. Raises :class:`BadIdentity` otherwise.
        """
        if not _SERVICE_NAME.fullmatch(name):
            raise BadIdentity(f"service name {name!r} must be '_' and a-z, 0-9 or '-' after it")
        return self._issue_own(name, ExtendedKeyUsageOID.CLIENT_AUTH, None, now, life)

    def _issue_own(
        self,
        name: str,
        usage: x509.ObjectIdentifier,
        san: x509.SubjectAlternativeName | None,
        now: datetime,
        life: timedelta,
    ) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP384R1())
        cert = self._issue(_name(name), key.public_key(), usage, san, now, life)
        return _private_pem(key), cert

    def _issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        usage: x509.ObjectIdentifier,
        san: x509.SubjectAlternativeName | None,
        now: datetime,
        life: timedelta,
    ) -> bytes:
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage([usage]), False),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
        ]
        if san is not None:
            extensions.append((san, False))
        builder = (
            x509.CertificateBuilder(self.cert.subject, subject, key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(min(now + life, self.cert.not_valid_after_utc))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def read_certificate(pem: bytes) -> x509.Certificate:
    """Parse one PEM certificate; raise :class:`BadIdentity`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise BadIdentity(f"not a PEM certificate: {error}") from error


def fingerprint(cert_pem: bytes) -> str:
    """Return the SHA-256 of a certificate's DER in hexadecimal; raise :class:`BadIdentity`."""
    return read_certificate(cert_pem).fingerprint(hashes.SHA256()).hex()


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as SubjectPublicKeyInfo PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a P-384 private key; raise :class:`BadIdentity`."""
    key = _load_private(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise BadIdentity(f"{path} holds no P-384 key; enrol again")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadIdentity(f"cannot read {path}: {error.strerror}") from error


def _load_private(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:
        raise BadIdentity(f"{path} holds no private key: {error}") from error


def _private_pem(key: ec.EllipticCurvePrivateKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _p384(key: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise BadIdentity("a device key must be EC P-384")
    return key


def _device_named(subject: x509.Name) -> str:
    names = list(subject)
    if len(names) == 1 and names[0].oid == NameOID.COMMON_NAME:
        name = str(names[0].value)
        if DEVICE_ID.fullmatch(name):
            return name
    raise BadIdentity(f"certificate names no device: {subject.rfc4514_string()!r}")


def _seal_uri(seal: X25519PublicKey) -> str:
    return SEAL_URN + urlsafe_b64encode(seal.public_bytes_raw()).decode().rstrip("=")


def _seal_name(seal: X25519PrivateKey) -> x509.SubjectAlternativeName:
    uri = _seal_uri(seal.public_key())
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


def _seal_in(names: Iterable[x509.GeneralName]) -> X25519PublicKey:
    uris = [
        name.value
        for name in names
        if isinstance(name, x509.UniformResourceIdentifier) and name.value.startswith(SEAL_URN)
    ]
    if len(uris) != 1:
        raise BadIdentity(f"expected one sealing key and found {len(uris)}")
    try:
        return X25519PublicKey.from_public_bytes(
            urlsafe_b64decode(uris[0].removeprefix(SEAL_URN) + "=")
        )
    except ValueError as error:
        raise BadIdentity(f"unusable sealing key: {error}") from error
