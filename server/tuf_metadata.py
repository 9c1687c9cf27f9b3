"""What both sides of signing share: the roles' keys and lives, and metadata as bytes.

The Update Framework 1.0.34 by python-tuf's Metadata API; keys are Ed25519, as unencrypted
PKCS #8 in PEM files that only their owner may read.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # public
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, without ``__all__``
    Metadata,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from atoll.fleet import bundle as bundles
from atoll.fleet import trust
from atoll.fleet.files import write_atomic
from atoll.server.errors import BadInput

OFFLINE: Final = ("root", "targets")
"""Roles whose keys a person keeps."""
ONLINE: Final = ("snapshot", "timestamp")
"""Roles whose keys the hub has."""
LIFE: Final[Mapping[str, timedelta]] = {
    "root": timedelta(days=5 * 365),
    "targets": timedelta(days=2 * 365),
    "snapshot": timedelta(days=14),
    "timestamp": timedelta(days=2),
}
"""How long each role's metadata is good for.

Short where the hub can renew it by itself: for so long a device can be kept from news
unnoticed. Long where a person has to come with a key.
"""


Kind = TypeVar("Kind", Root, Snapshot, Targets, Timestamp)


class BadRelease(BadInput):
    """Signed targets or files that the repository must not take."""

    code = "bad-release"


def create_keys(offline: Path, online: Path) -> list[Path]:
    """Make those of the four keys that are missing, and return their files.

    ``root.pem`` and ``targets.pem`` go to ``offline``, the others to ``online``. A key that is
    there is never replaced.
    """
    wanted = [key_file(offline, name) for name in OFFLINE]
    wanted += [key_file(online, name) for name in ONLINE]
    missing = [path for path in wanted if not path.exists()]
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, CryptoSigner.generate_ed25519().private_bytes)
    return missing


def key_file(directory: Path, name: str) -> Path:
    """Return where the key of the role ``name`` lies."""
    return directory / f"{name}.pem"


def signer(directory: Path, name: str) -> CryptoSigner:
    """Read a key; raise :class:`BadInput` when it is not there or is none of ours."""
    path = key_file(directory, name)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise BadInput(
            f"cannot read the {name} key {path}: {error.strerror}",
            "bring the medium with the key, or name its directory",
        ) from error
    except ValueError as error:
        raise BadInput(f"{path} is no private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{path} is not an Ed25519 key", "use the key that was made for this hub")
    return CryptoSigner(key)


def signed(content: Kind, by: CryptoSigner) -> bytes:
    """Return signed metadata as JSON."""
    metadata = Metadata[Kind](content)
    metadata.sign(by)
    return metadata.to_bytes(JSONSerializer(compact=False, validate=True))


def parse(data: bytes, kind: type[Kind]) -> Metadata[Kind]:
    """Read metadata of one role; raise :class:`BadRelease`. Signatures are not looked at."""
    try:
        metadata = Metadata[Kind].from_bytes(data)
    except RepositoryError as error:
        raise BadRelease(f"not {kind.type} metadata: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise BadRelease(f"not {kind.type} metadata")
    return metadata


def holds(targets: Mapping[str, TargetFile], model: str, release: int) -> bool:
    """Tell whether a release is among the targets."""
    return trust.target_path(model, release, bundles.MANIFEST) in targets


def expiry(role: str, now: datetime) -> datetime:
    """Return when metadata signed ``now`` (UTC) expires; TUF counts whole seconds."""
    return (now + LIFE[role]).replace(microsecond=0)
