"""What a device keeps of a run from one round to the next, besides its examples.

    kept = KeptFiles(directory)                     on a device;  KeptHere() in simulations
    carried = Carried(kept, run, "residual")
    before = carried.as_of(counted, fresh)          float32 (n,)
    carried.put(number, before, after)

Some ways of training remember something on the device: what a codec left out, a control variate,
layers that never leave. A device does not learn from a sum whether its term got into it. So what
it carries has two values: that of the last round known to have counted, and that of a later
one, which becomes the first when the hub says in a later round that it counted, and is forgotten
when it did not. A round asked again begins from the same value, and ends with the same bytes.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Final, Protocol

import numpy as np

from atoll.federation.parameters import Vector

RUNS: Final = 4
"""What belongs to the latest runs is kept; an older run has ended."""


class Kept(Protocol):
    """Bytes by run and name, on this device alone."""

    def load(self, run: str, name: str) -> bytes | None:
        """Return what was saved last, or none."""
        ...

    def save(self, run: str, name: str, value: bytes) -> None:
        """Replace it, durably, before the round is answered; raises :class:`OSError`."""
        ...


class KeptHere:
    """Keeps as long as the process lives: for the in-process engine and for tests."""

    def __init__(self) -> None:
        self._by_run: dict[str, dict[str, bytes]] = {}

    def load(self, run: str, name: str) -> bytes | None:
        """Return what was saved last, or none."""
        return self._by_run.get(run, {}).get(name)

    def save(self, run: str, name: str, value: bytes) -> None:
        """Replace it."""
        held = self._by_run.pop(run, {})
        held[name] = value
        self._by_run[run] = held
        while len(self._by_run) > RUNS:
            del self._by_run[next(iter(self._by_run))]


class KeptFiles:
    """Keeps in files, a directory for each run; named by digests, as a run's name is the hub's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, run: str, name: str) -> bytes | None:
        """Return what was saved last, or none."""
        try:
            return self._file(run, name).read_bytes()
        except FileNotFoundError:
            return None

    def save(self, run: str, name: str, value: bytes) -> None:
        """Replace it whole: written beside its place, flushed to the disk, renamed."""
        file = self._file(run, name)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        try:
            with beside.open("wb") as out:
                out.write(value)
                out.flush()
                os.fsync(out.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
        for directory in (file.parent, self._directory):
            _sync(directory)
        self._forget(file.parent)

    def _file(self, run: str, name: str) -> Path:
        digests = (hashlib.sha256(part.encode()).hexdigest()[:32] for part in (run, name))
        return self._directory.joinpath(*digests)

    def _forget(self, latest: Path) -> None:
        """Keep the latest runs by the order of their saving, which no clock that is set changes."""
        others = [run for run in self._directory.iterdir() if run != latest]
        ages = {run: run.stat().st_mtime_ns for run in others}
        after = max([latest.stat().st_mtime_ns, *(age + 1 for age in ages.values())])
        os.utime(latest, ns=(after, after))
        for run in sorted(others, key=ages.__getitem__)[: -(RUNS - 1)]:
            rmtree(run, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Flush a directory to the disk, so that a rename in it outlives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Carried:
    """One vector that a device carries through a run."""

    def __init__(self, kept: Kept, run: str, name: str) -> None:
        self._kept, self._run, self._name = kept, run, name

    def as_of(self, counted: int, fresh: Callable[[], Vector]) -> Vector:
        """Return the value to begin with, float32 ``(n,)``, when round ``counted`` counted last.

        ``fresh()`` gives that of the first round, and of a device that has lost what it kept.
        """
        known = self._read()
        if known is None:
            return fresh()
        number, before, after = known
        return after if 0 < number <= counted else before

    def put(self, number: int, before: Vector, after: Vector) -> None:
        """Keep ``after``, which is the value if round ``number`` counts, and ``before`` if not.

        Of a round that was asked again the first answer is the one that counts, so that is kept;
        and of an earlier round nothing, after a later one.
        """
        known = self._read()
        if known is not None and known[0] >= number:
            return
        body = io.BytesIO()
        np.savez(body, number=np.array(number), before=before, after=after)
        self._kept.save(self._run, self._name, body.getvalue())

    def _read(self) -> tuple[int, Vector, Vector] | None:
        held = self._kept.load(self._run, self._name)
        if held is None:
            return None
        try:
            with np.load(io.BytesIO(held), allow_pickle=False) as file:
                return (
                    int(file["number"]),
                    file["before"].astype(np.float32),
                    file["after"].astype(np.float32),
                )
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            # A damaged file is a lost one: what was carried begins anew.
            return None
