"""Two directories per model: the one that serves, and the one being prepared.

``models/{model}/a`` and ``b``. Which one serves is one row of the database, written after the
serving process has accepted the release; so a crash at any moment leaves either the old
release or the new one, each whole. A slot's marker file is written last: without it the
directory is half-finished and is thrown away.
"""

import shutil
from pathlib import Path
from typing import Final

import msgspec

from atoll.edge_agent.database import Database
from atoll.edge_agent.events import Release
from atoll.edge_agent.paths import sync_tree, translate
from atoll.fleet.files import PUBLIC, sync_directory, write_atomic

MARKER: Final = ".release"
KEY: Final = "installed"
LAST: Final = "last:"
NAMES: Final = ("a", "b")


class Installed(msgspec.Struct, frozen=True):
    """The release that serves, and the slot it lies in."""

    model: str
    release: int
    slot: str


def installed(database: Database) -> Installed | None:
    """Return what serves."""
    return database.get(KEY, Installed)


def holding(models: Path, release: Release) -> Path | None:
    """Return the slot that holds ``release`` whole, or none."""
    for name in NAMES:
        slot = models / release.model / name
        try:
            if (slot / MARKER).read_text() == str(release.number):
                return slot
        except OSError:
            continue
    return None


def spare(models: Path, model: str, serving: Installed | None) -> Path:
    """Return the slot of ``model`` that does not serve; it may hold anything or nothing."""
    if serving is not None and serving.model == model and serving.slot == NAMES[0]:
        return models / model / NAMES[1]
    return models / model / NAMES[0]


def seal(staging: Path, slot: Path, number: int) -> None:
    """Move a verified directory into its slot; raise ``DiskFull`` or ``DataUnwritable``."""
    try:
        write_atomic(staging / MARKER, str(number).encode(), PUBLIC)
        sync_tree(staging)
        if slot.exists():
            # Unmark first: should we die half way through, the rest is no release.
            (slot / MARKER).unlink(missing_ok=True)
            shutil.rmtree(slot)
        staging.rename(slot)
        sync_directory(slot.parent)
    except OSError as error:
        raise translate(error, slot) from error


def install(database: Database, models: Path, release: Release | None) -> None:
    """Record which release serves, durably."""
    if release is None:
        database.put(KEY, None)
        return
    slot = holding(models, release)
    if slot is None:
        return
    database.put(f"{LAST}{release.model}", release.number)
    database.put(KEY, Installed(release.model, release.number, slot.name))


def last(database: Database, model: str) -> int | None:
    """Return the release of ``model`` that served last, even if nothing serves now.

    Updates are judged against it: else a hub could have a device stop and then go back
    further than the signing key allows.
    """
    return database.get(f"{LAST}{model}", int)
