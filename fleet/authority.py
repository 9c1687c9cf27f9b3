"""The hub's certificate authority: who gets which certificate, and for how long.

Every certificate is back-dated, because devices' clocks are wrong; see
:mod:`atoll.fleet.identity`.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from atoll.fleet.certificates import (
    load_key,
    p384,
    private_pem,
    read_certificate,
    read_file,
    seal_in,
    seal_uri,
    subject,
)
from atoll.fleet.errors import BadIdentity
from atoll.fleet.files import PUBLIC, write_atomic
from atoll.fleet.topics import check_device_id

BACKDATE: Final = timedelta(hours=24)
DEVICE_LIFE: Final = timedelta(days=30)
SERVER_LIFE: Final = timedelta(days=365)
AUTHORITY_LIFE: Final = timedelta(days=20 * 365)
AUTHORITY_BACKDATE: Final = timedelta(days=365)

HUB_SERVICE: Final = "_hub"
"""Name of the hub's own client certificate: no device can be called so."""

_SERVER_NAME: Final = "Atoll hub"
_SERVICE_NAME: Final = re.compile(r"_[a-z0-9-]{1,62}")

_UNREADABLE: Final = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the library raises for a request that is malformed or of a kind it does not know."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The hub's certificate authority: a self-signed root that issues leaves directly."""

    key: ec.EllipticCurvePrivateKey
    cert: x509.Certificate

    @classmethod
    def create(cls, name: str, now: datetime) -> "Authority":
        """Make a root called ``name``; ``now`` is aware."""
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key()
        builder = (
            x509.CertificateBuilder(subject(name), subject(name), public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - AUTHORITY_BACKDATE)
            .not_valid_after(now + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
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
        write_atomic(directory / "key.pem", private_pem(self.key))
        write_atomic(directory / "cert.pem", self.cert_pem, PUBLIC)

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """Read what :meth:`save` wrote; raise :class:`BadIdentity` when it is not whole."""
        key = load_key(directory / "key.pem")
        cert = read_certificate(read_file(directory / "cert.pem"))
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
            key = csr.public_key()
            san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except _UNREADABLE as error:
            raise BadIdentity(f"not a certificate request of ours: {error}") from error
        if not signed:
            raise BadIdentity("certificate request is not signed by the key it names")
        seal = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(seal_uri(seal_in(san)))])
        check_device_id(device)
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._issue(device, p384(key), usage, seal, now, life)

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
        cert = self._issue(name, key.public_key(), usage, san, now, life)
        return private_pem(key), cert

    def _issue(
        self,
        name: str,
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
            x509.CertificateBuilder(self.cert.subject, subject(name), key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(min(now + life, self.cert.not_valid_after_utc))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


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
