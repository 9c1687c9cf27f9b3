"""Takes in what devices send: in batches, acknowledged after the commit.

A message that cannot be read or is of nobody we know is counted, logged once for its device
and acknowledged: it would never get better. What fails for want of the database is kept, not
acknowledged, and tried again. What a message changes is :mod:`atoll.server.intake`'s.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from atoll.fleet import topics
from atoll.fleet.errors import BadTopic
from atoll.fleet.wire import Event, Window
from atoll.server.context import Clock
from atoll.server.events import Bus, Subject
from atoll.server.intake import Received, Unreadable, read, store_batch
from atoll.server.link import Incoming, Link
from atoll.server.store import Store

log = logging.getLogger(__name__)

TOPICS: Final = tuple(topics.topic("+", leaf) for leaf in topics.DEVICE_PUBLISHES)

_BATCH: Final = 256
_PAUSE: Final = 1.0


class Ingest:
    """A thread that stores what the link receives, in batches."""

    def __init__(self, store: Store, clock: Clock, bus: Bus) -> None:
        self._store = store
        self._clock = clock
        self._bus = bus
        self._waiting: queue.SimpleQueue[Incoming | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._unreadable: Counter[str] = Counter()

    @property
    def unreadable(self) -> Mapping[str, int]:
        """Messages dropped since the start, by device; ``""`` for topics that are not ours."""
        return dict(self._unreadable)

    def receive(self, message: Incoming) -> None:
        """Take a message from the link; never blocks. The broker bounds what may wait here."""
        self._waiting.put(message)

    def start(self, link: Link) -> None:
        """Begin to store, acknowledging through ``link``."""
        self._thread = threading.Thread(target=self._run, args=(link,), name="ingest", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the batch at hand; what waits behind it is sent again another time."""
        self._stopping.set()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, link: Link) -> None:
        while (batch := self._next()) is not None:
            self._settle(batch, link)

    def _settle(self, batch: Sequence[Incoming], link: Link) -> None:
        """Store and acknowledge a batch; a message that no database would take is dropped."""
        while not self._stopping.is_set():
            try:
                self._take(batch)
            except OperationalError as error:
                log.error("cannot store messages, trying again: %s", error)  # noqa: TRY400  the error says it all
                self._stopping.wait(_PAUSE)
                continue
            except (SQLAlchemyError, ValueError, OverflowError) as error:
                if len(batch) > 1:
                    for message in batch:
                        self._settle([message], link)
                    return
                self._drop(_speaker(batch[0]), f"it cannot be stored ({error})")
            for message in batch:
                link.ack(message)
            return

    def _next(self) -> list[Incoming] | None:
        """Return the messages that wait, at least one, or none to end."""
        batch: list[Incoming] = []
        while len(batch) < _BATCH:
            try:
                message = self._waiting.get(block=not batch)
            except queue.Empty:
                break
            if message is None or self._stopping.is_set():
                return None
            batch.append(message)
        return batch

    def _take(self, batch: Iterable[Incoming]) -> None:
        readable: list[Received] = []
        dropped: list[tuple[str, str]] = []
        for message in batch:
            try:
                readable.append(read(message))
            except Unreadable as error:
                dropped.append((error.device or "", str(error)))
        if readable:
            with self._store.begin() as connection:
                unknown = store_batch(connection, readable, self._clock())
            dropped += [(device, "it is not enrolled here") for device in unknown]
            self._bus.publish(*_subjects(readable))
        for device, why in dropped:
            self._drop(device, why)

    def _drop(self, device: str, why: str) -> None:
        if not self._unreadable[device]:
            log.warning("dropping a message of %s: %s", device or "nobody we know", why)
        self._unreadable[device] += 1


def _speaker(message: Incoming) -> str:
    try:
        return topics.parse(message.topic).device
    except BadTopic:
        return ""


def _subjects(batch: Iterable[Received]) -> set[Subject]:
    subjects: set[Subject] = {"devices"}
    for received in batch:
        if isinstance(received.envelope.body, Event):
            subjects.add("alerts")
        if isinstance(received.envelope.body, Window):
            subjects.add("drift")
    return subjects
