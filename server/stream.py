"""Server-sent events: tells an open page that what it shows has changed.

Runs write to the database from another process, so what has changed is found by asking each
table for a cheap mark (a count, a largest id); hints on the :class:`~atoll.server.events.Bus`
only make the next look come sooner. However many pages are open, the tables are asked at most
once in :data:`INTERVAL` and by none when no page is.

A stream sends ``changed`` events (https://html.spec.whatwg.org/multipage/server-sent-events.html)
whose data are the subjects and whose id is a mark; a page that comes back with an older mark
is told at once.
"""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final

from sqlalchemy import Executable, func, select
from starlette.concurrency import run_in_threadpool

from atoll.server import schema
from atoll.server.events import Bus, Subject
from atoll.server.store import Store

INTERVAL: Final = 1.0
"""Seconds between two looks at the tables."""
HEARTBEAT: Final = 15.0
"""Seconds after which a silent stream sends a comment, so that a dead one is noticed."""


def _questions() -> dict[Subject, Sequence[Executable]]:
    devices, twins, runs, rollouts = (
        schema.devices.c,
        schema.twins.c,
        schema.runs.c,
        schema.rollouts.c,
    )
    alerts, largest = schema.alerts.c, func.max
    return {
        "devices": (
            select(
                largest(devices.last_seen),
                largest(devices.enrolled_at),
                func.count(devices.revoked_at),
                func.sum(devices.https_up + devices.https_down),
            ),
            select(func.count()).where(devices.online),
            select(largest(twins.reported_at), func.sum(twins.desired_version)),
            select(largest(schema.windows.c.message)),
            select(largest(schema.health.c.received_at)),
        ),
        "runs": (
            select(runs.id, runs.state, runs.stage, runs.ended_at),  # few rows, changed in place
            select(
                largest(schema.rounds.c.started_at),
                func.count(schema.rounds.c.run),
                func.count(schema.rounds.c.accuracy),
            ),
            select(largest(schema.ledger.c.id)),
        ),
        "models": (
            select(largest(schema.releases.c.published_at)),
            select(largest(rollouts.id), largest(rollouts.updated_at)),
        ),
        "alerts": (
            select(
                largest(alerts.id), func.count(alerts.acknowledged_at), func.count(alerts.closed_at)
            ),
        ),
        "drift": (select(largest(schema.drift.c.at), func.count(schema.drift.c.device)),),
        "audit": (select(largest(schema.audit.c.index)),),
    }


QUESTIONS: Final = _questions()
"""Per subject, cheap questions whose answers differ once what the dashboard shows has changed."""

Marks = Mapping[Subject, int]
"""How often each subject was seen to change."""
Answers = tuple[tuple[object, ...], ...]


class Changes:
    """Notices changes of the tables, for all pages and streams of a hub; for any thread."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self.bus = bus
        self._store = store
        self._epoch = secrets.token_hex(4)  # marks of a hub that ran before mean nothing
        self._seen: dict[Subject, Answers] = {}
        self._marks: dict[Subject, int] = dict.fromkeys(QUESTIONS, 0)
        self._looked_at = float("-inf")
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()

    @property
    def subjects(self) -> Sequence[Subject]:
        """What can change."""
        return tuple(QUESTIONS)

    @property
    def closing(self) -> bool:
        """Whether streams must end."""
        return self._closing.is_set()

    def close(self) -> None:
        """End all streams; a server that waits for them can then stop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._closing.set)
        else:
            self._closing.set()

    def look(self, *, fresh: bool = False) -> Marks:
        """Return the marks, asking the tables if they are older than :data:`INTERVAL`."""
        with self._lock:
            if fresh or time.monotonic() - self._looked_at >= INTERVAL:
                for subject, answers in self._ask().items():
                    if self._seen.get(subject) != answers:
                        self._seen[subject] = answers
                        self._marks[subject] += 1
                self._looked_at = time.monotonic()
            return dict(self._marks)

    def words(self, marks: Marks, subjects: Sequence[Subject]) -> str:
        """Return the marks of some subjects as text."""
        return self._epoch + "".join(f".{marks[subject]}" for subject in subjects)

    async def wait(self, hint: asyncio.Task[frozenset[Subject]], seconds: float) -> None:
        """Wait for a hint or the end, at most ``seconds``; belongs to one event loop."""
        self._loop = asyncio.get_running_loop()
        end = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({hint, end}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            end.cancel()

    def _ask(self) -> dict[Subject, Answers]:
        with self._store.read() as connection:
            return {
                subject: tuple(tuple(connection.execute(query).all()) for query in queries)
                for subject, queries in QUESTIONS.items()
            }


async def events(
    changes: Changes,
    subjects: Sequence[Subject],
    last: str | None,
    admitted: Callable[[], bool],
) -> AsyncIterator[str]:
    """Yield the text of a stream about ``subjects`` until it is closed.

    ``last`` is the mark that the reader has seen. ``admitted`` is asked in a thread at every
    heartbeat whether the reader may still look.
    """
    with changes.bus.subscribe() as subscription:
        hint = asyncio.create_task(subscription.changed())
        try:
            marks = await run_in_threadpool(changes.look, fresh=True)
            if last is None or last != changes.words(marks, subjects):
                yield _event(changes.words(marks, subjects), subjects)
            else:
                yield ": here\n\n"
            quiet = 0.0
            while not changes.closing:
                await changes.wait(hint, INTERVAL)
                hinted = hint.done()
                if hinted:
                    hint = asyncio.create_task(subscription.changed())
                before, marks = marks, await run_in_threadpool(changes.look, fresh=hinted)
                changed = [subject for subject in subjects if marks[subject] != before[subject]]
                if changed:
                    quiet = 0.0
                    yield _event(changes.words(marks, subjects), changed)
                    continue
                quiet += INTERVAL
                if quiet >= HEARTBEAT:
                    quiet = 0.0
                    if not await run_in_threadpool(admitted):
                        return
                    yield ": here\n\n"
        finally:
            hint.cancel()


def _event(mark: str, subjects: Sequence[Subject]) -> str:
    return f"id: {mark}\nevent: changed\ndata: {' '.join(subjects)}\n\n"
