"""The signed model repository: The Update Framework 1.0.34, by python-tuf's Metadata API.

Two keys stay offline, with a person: ``root`` (who may sign what) and ``targets`` (which files
are a release). The hub holds two online keys: ``snapshot`` and ``timestamp``, which only say
what is newest. A stolen hub can therefore repeat or withhold; it can neither make a release
nor bring one back that the offline key has moved past.

Layout of the repository, as ``tuf.ngclient`` reads it with consistent snapshots (``Updater``
with its defaults: ``prefix_targets_with_hash=True``)::

    metadata/1.root.json  N.targets.json  N.snapshot.json  timestamp.json
    targets/{model}/{release}/{sha256}.{file}

Target paths are ``{model}/{release}/{file}`` (:func:`atoll.fleet.trust.target_path`), and each
target's ``custom`` field says its release and the fallback.

    ensure(tuf, offline, online, now) -> bool          at the hub's start
    init_repository(tuf, offline, online, now)         once; an empty repository
    current_targets(tuf) -> bytes                      what a signer starts from
    accept_release(tuf, online, targets, bundle, now) -> Release
                                                       verify, place, new snapshot and timestamp
    refresh(tuf, online, now) -> bool                  every so often: before they expire

Keys are made by :func:`atoll.server.tuf_metadata.create_keys`; a release is signed, where the
offline key is, by :mod:`atoll.server.signing`.

``now`` is an aware datetime, UTC. Every file is written beside its place and renamed, and
``timestamp.json``, which makes the rest visible, is written last: an interruption leaves the
repository as it was.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, without ``__all__``
    MetaFile,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)

from atoll.fleet import bundle as bundles
from atoll.fleet import trust
from atoll.fleet.errors import BadBundle
from atoll.fleet.files import PUBLIC, write_atomic
from atoll.server.errors import Conflict, HubError, Unavailable
from atoll.server.tuf_metadata import (
    LIFE,
    OFFLINE,
    ONLINE,
    BadRelease,
    Kind,
    create_keys,
    expiry,
    holds,
    key_file,
    parse,
    signed,
    signer,
)

_ROOM: Final = 0.5
"""Online metadata is renewed once less than this share of its life is left."""


class Release(NamedTuple):
    """A release that the repository has taken."""

    model: str
    release: int
    fallback: int | None
    manifest: bundles.Manifest


def ensure(tuf: Path, offline: Path, online: Path, now: datetime) -> bool:
    """Make keys and an empty repository unless there is one, and renew what has aged.

    Returns whether the offline keys lie on this machine, which a person should end.
    """
    if not (tuf / "metadata" / "1.root.json").exists():
        create_keys(offline, online)
        init_repository(tuf, offline, online, now)
    refresh(tuf, online, now)
    return any(key_file(offline, name).exists() for name in OFFLINE)


def init_repository(tuf: Path, offline: Path, online: Path, now: datetime) -> None:
    """Write an empty repository; raise :class:`Conflict` where there is one."""
    if (tuf / "metadata" / "1.root.json").exists():
        raise Conflict(f"{tuf} holds a repository already")
    signers = {name: signer(offline, name) for name in OFFLINE}
    signers |= {name: signer(online, name) for name in ONLINE}
    root = Root(expires=expiry("root", now), consistent_snapshot=True)
    for name, key in signers.items():
        root.add_key(key.public_key, name)
    (tuf / "targets").mkdir(parents=True, exist_ok=True)
    (tuf / "metadata").mkdir(parents=True, exist_ok=True)
    targets = Targets(expires=expiry("targets", now))
    snapshot = Snapshot(expires=expiry("snapshot", now))
    timestamp = Timestamp(expires=expiry("timestamp", now))
    _publish(tuf, "1.targets.json", signed(targets, signers["targets"]))
    _publish(tuf, "1.snapshot.json", signed(snapshot, signers["snapshot"]))
    _publish(tuf, "timestamp.json", signed(timestamp, signers["timestamp"]))
    # Enrolment begins when there is a root, so it comes last here.
    write_atomic(tuf / "metadata" / "1.root.json", signed(root, signers["root"]), PUBLIC)


def current_targets(tuf: Path) -> bytes:
    """Return the targets metadata that devices see now; raise :class:`Unavailable`."""
    version = _chain(tuf)[2].version
    return _metadata_file(tuf, f"{version}.targets.json").read_bytes()


def accept_release(tuf: Path, online: Path, targets: bytes, bundle: Path, now: datetime) -> Release:
    """Take a signed release into the repository; raise :class:`BadRelease` or :class:`Conflict`.

    ``targets`` must be signed by the key that the root names, be the next version, keep every
    target that was there, and add exactly one complete release whose files are those of
    ``bundle``. The same ones again, taken already, change nothing.
    """
    with _locked(tuf):
        root, _, before = _chain(tuf)
        after = parse(targets, Targets)
        if after.signed == before:
            previous = _read(tuf, root, f"{before.version - 1}.targets.json", Targets)
            return _added(previous, before, bundle)
        try:
            root.verify_delegate("targets", after.signed_bytes, after.signatures)
        except RepositoryError as error:
            raise BadRelease(
                f"the targets are not signed with this hub's targets key ({error})",
                "sign with the key that was made for this hub",
            ) from error
        if after.signed.version != before.version + 1:
            raise Conflict(
                f"the signed targets are version {after.signed.version}; the next one is "
                f"{before.version + 1}",
                "another release was published meanwhile: sign again",
            )
        if after.signed.is_expired(now):
            raise BadRelease("the signed targets have expired; check the signer's clock")
        release = _added(before, after.signed, bundle)
        for name in bundles.FILES:
            _place(tuf, release, name, after.signed, bundle)
        _publish(tuf, f"{after.signed.version}.targets.json", targets)
        _sign_online(tuf, online, after.signed.version, now)
        return release


def refresh(tuf: Path, online: Path, now: datetime) -> bool:
    """Sign snapshot and timestamp anew when they are due; return whether they were."""
    with _locked(tuf):
        _, (snapshot, timestamp), targets = _chain(tuf)
        due = [
            content.expires - now < LIFE[role] * _ROOM
            for role, content in (("snapshot", snapshot), ("timestamp", timestamp))
        ]
        if not any(due):
            return False
        _sign_online(tuf, online, targets.version, now)
        return True


class _Online(NamedTuple):
    snapshot: Snapshot
    timestamp: Timestamp


def _chain(tuf: Path) -> tuple[Root, _Online, Targets]:
    """Return what devices see now, from the timestamp down; raise :class:`Unavailable`."""
    roots = [path for path in (tuf / "metadata").glob("*.root.json") if path.stem[:-5].isdigit()]
    if not roots:
        raise Unavailable(f"{tuf} holds no model repository", "start the hub once to make it")
    newest = max(roots, key=lambda path: int(path.stem[:-5]))
    root = parse(newest.read_bytes(), Root).signed
    timestamp = _read(tuf, root, "timestamp.json", Timestamp)
    snapshot = _read(tuf, root, f"{timestamp.snapshot_meta.version}.snapshot.json", Snapshot)
    version = snapshot.meta["targets.json"].version
    return root, _Online(snapshot, timestamp), _read(tuf, root, f"{version}.targets.json", Targets)


def _read(tuf: Path, root: Root, name: str, kind: type[Kind]) -> Kind:
    try:
        found = parse(_metadata_file(tuf, name).read_bytes(), kind)
        root.verify_delegate(kind.type, found.signed_bytes, found.signatures)
    except (OSError, RepositoryError, HubError) as error:
        raise Unavailable(
            f"the model repository is damaged: {name}: {error}", "restore it from a backup"
        ) from error
    return found.signed


def _added(before: Targets, after: Targets, bundle: Path) -> Release:
    """Return the one release that ``after`` adds to ``before``; raise :class:`BadRelease`."""
    for path, target in before.targets.items():
        if after.targets.get(path) != target:
            raise BadRelease(f"the signed targets change or drop {path}, which is published")
    try:
        manifest = bundles.read(bundle)
        new = {path: after.targets[path] for path in after.targets.keys() - before.targets.keys()}
        parsed = [trust.parse_target_path(path) for path in new]
        infos = {trust.info_of(path, target) for path, target in new.items()}
        earlier = trust.newest(before.targets, manifest.model)
    except BadBundle as error:
        raise BadRelease(str(error)) from error
    which = {(found.model, found.release) for found in parsed}
    if len(which) != 1 or len(infos) != 1 or {found.file for found in parsed} != set(bundles.FILES):
        raise BadRelease("the signed targets do not add exactly one complete release")
    model, release = which.pop()
    info = infos.pop()
    if model != manifest.model:
        raise BadRelease(f"the signed release is of {model!r}, the bundle of {manifest.model!r}")
    if earlier is not None and release <= earlier.release:
        raise BadRelease(f"{model} release {earlier.release} is published already")
    if info.fallback is not None and not holds(before.targets, model, info.fallback):
        raise BadRelease(f"{model} release {info.fallback}, the fallback, is not published")
    return Release(model, release, info.fallback, manifest)


def _place(tuf: Path, release: Release, name: str, targets: Targets, bundle: Path) -> None:
    target = targets.targets[trust.target_path(release.model, release.release, name)]
    data = (bundle / name).read_bytes()
    try:
        target.verify_length_and_hashes(data)
    except RepositoryError as error:
        raise BadRelease(
            f"{name} of the bundle is not the file that was signed",
            "sign the bundle of the same run",
        ) from error
    directory = tuf / "targets" / release.model / str(release.release)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / f"{target.hashes['sha256']}.{name}", data, PUBLIC)


def _sign_online(tuf: Path, online: Path, targets_version: int, now: datetime) -> None:
    """Write the next snapshot and then the timestamp that makes it visible."""
    _, (old_snapshot, old_timestamp), _ = _chain(tuf)
    snapshot = Snapshot(
        version=old_snapshot.version + 1,
        expires=expiry("snapshot", now),
        meta={"targets.json": MetaFile(targets_version)},
    )
    timestamp = Timestamp(
        version=old_timestamp.version + 1,
        expires=expiry("timestamp", now),
        snapshot_meta=MetaFile(snapshot.version),
    )
    name = f"{snapshot.version}.snapshot.json"
    _publish(tuf, name, signed(snapshot, signer(online, "snapshot")))
    _publish(tuf, "timestamp.json", signed(timestamp, signer(online, "timestamp")))


def _publish(tuf: Path, name: str, data: bytes) -> None:
    write_atomic(_metadata_file(tuf, name), data, PUBLIC)


def _metadata_file(tuf: Path, name: str) -> Path:
    return tuf / "metadata" / name


@contextmanager
def _locked(tuf: Path) -> Iterator[None]:
    """Keep other writers out; the lock goes with the process."""
    handle = os.open(tuf, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
