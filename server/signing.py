"""Signing a release, where the offline key is: at an operator's, without a network.

    next_release(current, model) -> TargetInfo(release, fallback)
    sign_release(current, bundle, offline, model=…, release=…, fallback=…, now=…) -> bytes

``current`` is the hub's targets metadata (:func:`atoll.server.repository.current_targets`);
what comes out goes to :func:`atoll.server.repository.accept_release`.
"""

from datetime import datetime
from pathlib import Path

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # public
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, without ``__all__``
    Metadata,
    TargetFile,
    Targets,
)

from atoll.fleet import bundle as bundles
from atoll.fleet import trust
from atoll.fleet.errors import BadBundle
from atoll.fleet.trust import TargetInfo
from atoll.server.tuf_metadata import BadRelease, expiry, holds, parse, signed, signer


def next_release(current: bytes, model: str) -> TargetInfo:
    """Return the number for the next release of ``model``, and the newest one as its fallback.

    Raises :class:`BadRelease` for bytes that are no targets metadata.
    """
    try:
        newest = trust.newest(parse(current, Targets).signed.targets, model)
    except BadBundle as error:
        raise BadRelease(str(error)) from error
    return TargetInfo(newest.release + 1, newest.release) if newest else TargetInfo(1, None)


def sign_release(
    current: bytes,
    bundle: Path,
    offline: Path,
    *,
    model: str,
    release: int,
    fallback: int | None,
    now: datetime,
) -> bytes:
    """Return new targets metadata with the bundle in it, signed with the offline key.

    Runs where the key is. ``current`` comes from the hub and is not taken on trust: it must
    carry this key's own signature. Raises :class:`BadRelease` for that, for a bundle that is
    not of ``model`` or is damaged, and for numbers that do not follow from what was signed
    before.
    """
    key = signer(offline, "targets")
    known = parse(current, Targets)
    if not _carries(known, key):
        raise BadRelease(
            "the hub's targets metadata does not carry your key's signature",
            "check that the key and the hub belong together, and what happened to the hub",
        )
    try:
        manifest = bundles.read(bundle)
        newest = trust.newest(known.signed.targets, model)
        path = trust.target_path(model, release, bundles.MANIFEST)
    except BadBundle as error:
        raise BadRelease(str(error)) from error
    if manifest.model != model:
        raise BadRelease(f"the bundle is of model {manifest.model!r}, not {model!r}")
    if newest is not None and release <= newest.release:
        raise BadRelease(f"{model} release {newest.release} is signed already; go on from there")
    if fallback is not None and not holds(known.signed.targets, model, fallback):
        raise BadRelease(f"{model} release {fallback}, the fallback, is not signed")
    custom = TargetInfo(release, fallback).custom()
    for name in bundles.FILES:
        path = trust.target_path(model, release, name)
        target = TargetFile.from_data(path, (bundle / name).read_bytes(), ["sha256"])
        target.unrecognized_fields["custom"] = custom
        known.signed.targets[path] = target
    known.signed.version += 1
    known.signed.expires = expiry("targets", now)
    return signed(known.signed, key)


def _carries(metadata: Metadata[Targets], key: CryptoSigner) -> bool:
    signature = metadata.signatures.get(key.public_key.keyid)
    if signature is None:
        return False
    try:
        key.public_key.verify_signature(signature, metadata.signed_bytes)
    except UnverifiedSignatureError:
        return False
    return True
