"""From a run's candidate, signed offline, to a release: repository and tables together.

The repository is what devices believe, so it decides: the row is written in a transaction
that commits when the repository has taken the release, and should the hub die in between,
:func:`reconcile` writes the row at the next start from the signed files.
"""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import Connection, insert, select, update
from tuf.api.metadata import Metadata, TargetFile, Targets  # type: ignore[attr-defined]  # public, without ``__all__``

from atoll.fleet import bundle, trust
from atoll.fleet.bundle import Manifest
from atoll.fleet.errors import BadBundle
from atoll.server import audit, repository
from atoll.server.errors import BadInput, Conflict, NotFound
from atoll.server.schema import releases, runs
from atoll.server.settings import Settings
from atoll.server.store import Store

log = logging.getLogger(__name__)

HUB: Final = "hub"


def publish(
    connection: Connection,
    settings: Settings,
    *,
    model: str,
    run: str,
    signed: bytes,
    actor: str,
    now: float,
) -> repository.Release:
    """Publish the candidate of ``run`` by the signed targets metadata that names it.

    ``connection`` must write and commit right after. Raises :class:`NotFound`,
    :class:`Conflict` for a run that left no candidate, and what
    :func:`atoll.server.repository.accept_release` raises.
    """
    row = connection.execute(select(runs.c.state, runs.c.model).where(runs.c.id == run)).first()
    if row is None:
        raise NotFound(f"there is no run {run!r}", "see the list of runs")
    if row.model != model:
        raise BadInput(f"run {run} is of the model {row.model!r}, not {model!r}")
    if row.state != "gated":
        raise Conflict(
            f"run {run} is {row.state}", "publish a run whose candidate passed its gates"
        )
    candidate = settings.candidates / run
    accepted = repository.accept_release(
        settings.tuf, settings.online_keys, signed, candidate, datetime.fromtimestamp(now, UTC)
    )
    profile = (candidate / bundle.PROFILE).read_bytes()
    _record(connection, accepted, profile, run, actor, now)
    return accepted


def reconcile(store: Store, settings: Settings, now: float) -> list[str]:
    """Write the rows of releases that the repository holds and the tables do not.

    Returns their names; raises :class:`atoll.server.errors.Unavailable` for a damaged
    repository.
    """
    with store.begin() as connection:
        known = {
            (row.model, row.release)
            for row in connection.execute(select(releases.c.model, releases.c.release))
        }
        written = []
        for found, profile in _signed(settings.tuf):
            if (found.model, found.release) not in known:
                here = connection.execute(
                    select(runs.c.id).where(runs.c.id == found.manifest.run)
                ).scalar()
                _record(connection, found, profile, here, HUB, now)
                written.append(f"{found.model} release {found.release}")
    return written


def _record(
    connection: Connection,
    release: repository.Release,
    profile: bytes,
    run: str | None,
    actor: str,
    now: float,
) -> None:
    connection.execute(
        insert(releases).values(
            model=release.model,
            release=release.release,
            fallback=release.fallback,
            run=run,
            manifest=msgspec.to_builtins(release.manifest),
            profile=profile,
            published_at=now,
            published_by=actor,
        )
    )
    if run is not None:
        connection.execute(update(runs).where(runs.c.id == run).values(state="published"))
    audit.record(
        connection,
        actor,
        "release.publish",
        f"{release.model}/{release.release}",
        now,
        run=run,
        fallback=release.fallback,
        files={name: digest.sha256 for name, digest in release.manifest.files.items()},
    )


def _signed(tuf: Path) -> Iterable[tuple[repository.Release, bytes]]:
    targets = Metadata[Targets].from_bytes(repository.current_targets(tuf)).signed.targets
    for path, target in sorted(targets.items()):
        found = trust.parse_target_path(path)
        if found.file != bundle.MANIFEST:
            continue
        info = trust.info_of(path, target)
        directory = tuf / "targets" / found.model / str(found.release)
        profile = targets[trust.target_path(found.model, found.release, bundle.PROFILE)]
        try:
            manifest = Manifest.decode(_file(directory, bundle.MANIFEST, target))
            counted = _file(directory, bundle.PROFILE, profile)
        except (OSError, BadBundle) as error:
            log.error("%s is signed but not here whole: %s", path, error)  # noqa: TRY400  the error says it all
            continue
        yield (
            repository.Release(found.model, found.release, info.fallback, manifest),
            counted,
        )


def _file(directory: Path, name: str, target: TargetFile) -> bytes:
    return (directory / f"{target.hashes['sha256']}.{name}").read_bytes()
