"""Who works on a run: one process, that of the Flower run that was started for it last.

Two things hold a run. Its row counts in ``attempt`` how often it was started with Flower, and
each start is told its number: a start that was given up and took effect all the same, or one that
Flower lost and then found, has an old number and ends without a word. And the process locks a
file beside the checkpoint for as long as it lives, with its number in it. The kernel lets go of
that lock however the process ends, so that no two ever write the same checkpoint, and the hub sees
at once what Flower notices after a minute.

    with claimed(store, folder, Start(run, attempt, flower), clock) as claim:
        claim.check()                    # raises Superseded
    ended(folder, attempt)               # what the hub asks
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, and_, or_, select, update

from atoll.federation.exchange import Clock
from atoll.privacy.ledger import LedgerStore, Record
from atoll.server.errors import Superseded, Unavailable
from atoll.server.schema import runs
from atoll.server.store import Store

NAME: Final = "lock"
PATIENCE: Final = 60.0
"""Seconds to wait for the process before to end: it may be asleep between two tries at a SuperLink
that is gone, for 20 s at most in flwr 1.41."""
_LOOK_SECONDS: Final = 0.2


class Start(NamedTuple):
    """A run as it was started with Flower: the how-manieth time, and as which Flower run."""

    run: str
    attempt: int
    flower: str


class Claim:
    """A run that is this process's, until another was started for it or it was cancelled."""

    def __init__(self, store: Store, start: Start) -> None:
        self._store, self._start = store, start

    @property
    def mine(self) -> ColumnElement[bool]:
        """The row of the run as long as it is ours to change."""
        return and_(_started(self._start), runs.c.flower_run == self._start.flower)

    def check(self) -> None:
        """Raise :class:`Superseded` unless the run is still ours."""
        with self._store.read() as connection:
            if connection.execute(select(runs.c.id).where(self.mine)).first() is None:
                raise Superseded(f"run {self._start.run} is not this process's any more")


class ClaimedLedgerStore:
    """A :class:`LedgerStore` in which a process charges for its run as long as that is its own."""

    def __init__(self, inner: LedgerStore, claim: Claim) -> None:
        self._inner, self._claim = inner, claim

    def events(self, population: str) -> Sequence[tuple[str, Record]]:
        """Return every ``(charge id, event)`` of ``population``."""
        return self._inner.events(population)

    def append_if_absent(
        self,
        population: str,
        charge: str,
        event: Record,
        allow: Callable[[Sequence[tuple[str, Record]]], None],
    ) -> bool:
        """Record an event unless ``charge`` is there; raise :class:`Superseded` if not ours."""
        self._claim.check()
        return self._inner.append_if_absent(population, charge, event, allow)


@contextmanager
def claimed(store: Store, folder: Path, start: Start, clock: Clock) -> Iterator[Claim]:
    """Hold a run in its ``folder``, the one with the checkpoint, for a block.

    Raises :class:`Superseded` when the run is another's or no longer running, and
    :class:`Unavailable` when the process before does not end within :data:`PATIENCE` seconds.
    """
    with store.begin() as connection:
        free = or_(runs.c.flower_run.is_(None), runs.c.flower_run == start.flower)
        taken = connection.execute(
            update(runs).where(_started(start), free).values(flower_run=start.flower)
        )
        if taken.rowcount == 0:
            raise Superseded(f"run {start.run} is not this process's to work on")
    claim = Claim(store, start)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a+b") as file:
        deadline = clock.now() + PATIENCE
        while not _locked(file.fileno(), fcntl.LOCK_EX):
            claim.check()
            if clock.now() >= deadline:
                raise Unavailable(
                    f"the process that worked on run {start.run} before does not end",
                    f"look for who holds {folder / NAME}",
                )
            clock.pause(_LOOK_SECONDS)
        os.ftruncate(file.fileno(), 0)
        file.write(str(start.attempt).encode())
        file.flush()
        yield claim


def ended(folder: Path, attempt: int) -> bool:
    """Tell whether the process of this start of a run has held it and is gone.

    One that has not come so far is not known here; Flower knows of it.
    """
    try:
        with (folder / NAME).open("rb") as file:
            held_last = file.read() == str(attempt).encode()
            return held_last and _locked(file.fileno(), fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _started(start: Start) -> ColumnElement[bool]:
    return and_(runs.c.id == start.run, runs.c.state == "running", runs.c.attempt == start.attempt)


def _locked(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
