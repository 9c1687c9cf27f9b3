"""Keys and certificates as files and bytes: reading, writing, and the names inside.

Shared by the device's side (:mod:`atoll.fleet.identity`) and the authority's
(:mod:`atoll.fleet.authority`).
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.x509.oid import NameOID

from atoll.fleet.errors import BadIdentity
from atoll.fleet.topics import DEVICE_ID

SEAL_URN: Final = "urn:atoll:x25519:"


def read_certificate(pem: bytes) -> x509.Certificate:
    """Parse one PEM certificate; raise :class:`BadIdentity`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion) as error:
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
    key = load_private(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise BadIdentity(f"{path} holds no P-384 key; enrol again")
    return key


def read_file(path: Path) -> bytes:
    """Read a file; raise :class:`BadIdentity` naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadIdentity(f"cannot read {path}: {error.strerror}") from error


def load_private(path: Path) -> object:
    """Read a private key of any kind; raise :class:`BadIdentity`."""
    try:
        return serialization.load_pem_private_key(read_file(path), None)
    except (ValueError, TypeError) as error:
        raise BadIdentity(f"{path} holds no private key: {error}") from error


def private_pem(key: ec.EllipticCurvePrivateKey | X25519PrivateKey) -> bytes:
    """Return a private key as unencrypted PKCS #8 PEM: the file's mode is what protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def subject(common_name: str) -> x509.Name:
    """Return the name ``CN=common_name`` and nothing else."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def p384(key: object) -> ec.EllipticCurvePublicKey:
    """Return ``key`` if it is a P-384 public key; raise :class:`BadIdentity`."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise BadIdentity("a device key must be EC P-384")
    return key


def device_named(name: x509.Name) -> str:
    """Return the device that a subject names; raise :class:`BadIdentity` if it is none."""
    parts = list(name)
    if len(parts) == 1 and parts[0].oid == NameOID.COMMON_NAME:
        device = str(parts[0].value)
        if DEVICE_ID.fullmatch(device):
            return device
    raise BadIdentity(f"certificate names no device: {name.rfc4514_string()!r}")


def seal_uri(seal: X25519PublicKey) -> str:
    """Return the URI under which a sealing key stands in a certificate."""
    return SEAL_URN + urlsafe_b64encode(seal.public_bytes_raw()).decode().rstrip("=")


def seal_in(names: Iterable[x509.GeneralName]) -> X25519PublicKey:
    """Return the one sealing key among ``names``; raise :class:`BadIdentity`."""
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
