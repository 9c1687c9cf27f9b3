"""Takes in what devices send: once each, in one transaction, acknowledged after its commit.

The broker lets a device publish in its own subtree alone, so the topic says who speaks. A
message that cannot be read or is of nobody we know is counted, logged once for its device and
acknowledged: it would never get better. What fails for want of the database is kept, not
acknowledged, and tried again.

Births and deaths are states of a connection rather than events: a last will has the same
``(boot, seq)`` each time it is sent, so they take effect by boot number whether new or not.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from atoll.fleet import topics
from atoll.fleet.errors import BadMessage, BadTopic
from atoll.fleet.wire import (
    Birth,
    Body,
    Death,
    Envelope,
    Event,
    Health,
    Reported,
    Window,
    decode,
)
from atoll.server.context import Clock
from atoll.server.events import Bus, Subject
from atoll.server.link import Incoming, Link
from atoll.server.schema import alerts, devices, health, messages, twins, windows
from atoll.server.store import Store
from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError, SQLAlchemyError

log = logging.getLogger(__name__)

TOPICS: Final = tuple(topics.topic("+", leaf) for leaf in topics.DEVICE_PUBLISHES)

_BATCH: Final = 256
_PAUSE: Final = 1.0

_LEAVES: Final[Mapping[type[Body], topics.Leaf]] = {
    Birth: "status",
    Death: "status",
    Reported: "reported",
    Window: "telemetry",
    Health: "telemetry",
    Event: "event",
}


@dataclass(frozen=True, slots=True)
class Received:
    """A message that could be read."""

    device: str
    envelope: Envelope
    raw: bytes
    bytes_up: int
    retained: bool


class Unreadable(Exception):
    """A message to count and forget; ``device`` is none when not even the topic is ours."""

    def __init__(self, device: str | None, why: str) -> None:
        super().__init__(why)
        self.device = device


def read(message: Incoming) -> Received:
    """Decode a message, or raise :class:`Unreadable`."""
    try:
        device, leaf = topics.parse(message.topic)
    except BadTopic as error:
        raise Unreadable(None, str(error)) from error
    try:
        envelope = decode(message.payload, Envelope)
    except BadMessage as error:
        raise Unreadable(device, str(error)) from error
    if _LEAVES[type(envelope.body)] != leaf:
        raise Unreadable(device, f"a {type(envelope.body).__name__} does not belong on {leaf}")
    if not (0 <= envelope.boot < 2**63 and 0 <= envelope.seq < 2**63):
        raise Unreadable(device, "boot or seq is out of range")
    size = len(message.payload) + len(message.topic)
    return Received(device, envelope, message.payload, size, message.retained)


def store_batch(connection: Connection, batch: Sequence[Received], now: float) -> set[str]:
    """Store messages and what they change; return the devices nobody knows here.

    Messages of unknown or revoked devices are dropped.
    """
    known = _known(connection, {received.device for received in batch})
    moved: Counter[str] = Counter()
    for received in batch:
        if received.device in known:
            moved[received.device] += received.bytes_up
            _store(connection, received, now)
    for device, size in moved.items():
        connection.execute(
            update(devices)
            .where(devices.c.id == device)
            .values(mqtt_up=devices.c.mqtt_up + size, last_seen=now)
        )
    return {received.device for received in batch} - known


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


def _known(connection: Connection, names: set[str]) -> set[str]:
    rows = connection.execute(
        select(devices.c.id).where(devices.c.id.in_(names), devices.c.revoked_at.is_(None))
    )
    return set(rows.scalars())


def _store(connection: Connection, received: Received, now: float) -> None:
    new = _insert(connection, received, now)
    match received.envelope.body:
        case Birth() as body:
            if new is not None or not received.retained:
                _born(connection, received.device, body)
        case Death() as body:
            if new is not None or not received.retained:
                _died(connection, received.device, body)
        case Reported() as body if new is not None:
            _reported(connection, received, body, now)
        case Window() as body if new is not None:
            _window(connection, received.device, new, body, now)
        case Health() as body if new is not None:
            _health(connection, received.device, body, now)
        case Event() as body if new is not None:
            _event(connection, received.device, body, now)


def _insert(connection: Connection, received: Received, now: float) -> int | None:
    """Insert the message; return its id, or none for a repeat."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    envelope = received.envelope
    found: int | None = connection.execute(
        dialect.insert(messages)
        .values(
            device=received.device,
            boot=envelope.boot,
            seq=envelope.seq,
            device_at=envelope.at,
            received_at=now,
            kind=_tag(envelope.body),
            body=received.raw,
        )
        .on_conflict_do_nothing()
        .returning(messages.c.id)
    ).scalar_one_or_none()
    return found


def _born(connection: Connection, device: str, body: Birth) -> None:
    connection.execute(
        update(devices)
        .where(devices.c.id == device, devices.c.boot <= body.boot)
        .values(
            online=True,
            boot=body.boot,
            agent_version=body.agent_version[:32],
            serve_url=body.serve_url[:255] if body.serve_url else None,
        )
    )


def _died(connection: Connection, device: str, body: Death) -> None:
    connection.execute(
        update(devices)
        .where(devices.c.id == device, devices.c.boot == body.boot)
        .values(online=False)
    )


def _reported(connection: Connection, received: Received, body: Reported, now: float) -> None:
    envelope = received.envelope
    later = (
        select(messages.c.id)
        .where(
            messages.c.device == received.device,
            messages.c.kind == "reported",
            (messages.c.boot > envelope.boot)
            | ((messages.c.boot == envelope.boot) & (messages.c.seq > envelope.seq)),
        )
        .limit(1)
    )
    if connection.execute(later).first() is None:
        connection.execute(
            update(twins)
            .where(twins.c.device == received.device)
            .values(reported=_json(body), reported_at=now)
        )


def _window(connection: Connection, device: str, message: int, body: Window, now: float) -> None:
    connection.execute(
        insert(windows).values(
            message=message,
            device=device,
            model=body.model[:63],
            release=body.release,
            received_at=now,
            start=body.start,
            end=body.end,
            rows=body.rows,
            counts=msgspec.msgpack.encode(body.counts),
        )
    )


def _health(connection: Connection, device: str, body: Health, now: float) -> None:
    values = {"received_at": now, "body": _json(body)}
    changed = connection.execute(update(health).where(health.c.device == device).values(**values))
    if changed.rowcount == 0:
        connection.execute(insert(health).values(device=device, **values))


def _event(connection: Connection, device: str, body: Event, now: float) -> None:
    if body.severity in ("warning", "error"):
        text = f"{body.kind}: {body.detail}" if body.detail else body.kind
        connection.execute(
            insert(alerts).values(
                at=now, kind="device", severity=body.severity, device=device, text=text
            )
        )


def _json(body: Reported | Health) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(body)
    del values["t"]
    return values


def _tag(body: Body) -> str:
    return str(type(body).__struct_config__.tag)


def _subjects(batch: Iterable[Received]) -> set[Subject]:
    subjects: set[Subject] = {"devices"}
    for received in batch:
        if isinstance(received.envelope.body, Event):
            subjects.add("alerts")
        if isinstance(received.envelope.body, Window):
            subjects.add("drift")
    return subjects
