"""What devices send is stored once, whatever is repeated, malformed or late."""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy import func, insert, select, update

from atoll.fleet.topics import topic
from atoll.fleet.wire import (
    Birth,
    Body,
    Death,
    Desired,
    Envelope,
    Event,
    Health,
    Reported,
    Window,
    decode,
    encode,
)
from atoll.server import desired
from atoll.server.intake import Received, Unreadable, read, store_batch
from atoll.server.link import Incoming
from atoll.server.schema import alerts, devices, health, messages, twins, windows
from atoll.server.store import Store

NOW = 1_790_000_000.0
SPOKEN = {
    Birth: "status",
    Death: "status",
    Reported: "reported",
    Window: "telemetry",
    Health: "telemetry",
    Event: "event",
}
BIRTH = Birth(boot=3, agent_version="1", serve_url="http://127.0.0.1:9000")
REPORTED = Reported(desired_version=1, model="m", release=1, state="serving")
WINDOW = Window(model="m", release=1, start=1.0, end=2.0, rows=5, counts={"x": b"\1\2"})
HEALTH = Health(
    rss={"control": 1}, disk_free=2, outbox_waiting=0, outbox_dropped=0, bytes_up=1, bytes_down=2
)
WARNING = Event(kind="disk", severity="warning", detail="90 % full")


def envelope(body: Body, boot: int = 3, seq: int = 1) -> bytes:
    return encode(Envelope(boot=boot, seq=seq, at=1.0, body=body))


def arrived(name: str, payload: bytes) -> Incoming:
    return Incoming(name, payload, retained=False, connection=1, mid=1, qos=1)


def incoming(body: Body, *, device: str = "w1", leaf: str = "", **numbers: int) -> Incoming:
    name = topic(device, leaf or SPOKEN[type(body)])  # type: ignore[arg-type]
    return arrived(name, envelope(body, **numbers))


def received(body: Body, *, retained: bool = False, **options: Any) -> Received:
    return replace(read(incoming(body, **options)), retained=retained)


def add_device(store: Store, name: str, **columns: Any) -> None:
    with store.begin() as connection:
        connection.execute(
            insert(devices).values(
                id=name,
                labels={},
                certificate="",
                serial=name,
                expires_at=NOW,
                enrolled_at=NOW,
                **columns,
            )
        )
        wanted = {"version": 0, "model": None, "release": None, "train": False}
        connection.execute(insert(twins).values(device=name, desired=wanted))


@pytest.fixture
def fleet(store: Store) -> Store:
    add_device(store, "w1")
    add_device(store, "gone", revoked_at=1.0)
    return store


def take(store: Store, *batch: Received, now: float = NOW) -> set[str]:
    with store.begin() as connection:
        return store_batch(connection, batch, now)


def row(store: Store, table: Any) -> Any:
    with store.read() as connection:
        return connection.execute(select(table)).first()


def size(store: Store, table: Any) -> int:
    with store.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def online(store: Store) -> bool:
    with store.read() as connection:
        return bool(
            connection.execute(select(devices.c.online).where(devices.c.id == "w1")).scalar_one()
        )


def test_each_kind_of_message_lands_in_its_place(fleet: Store) -> None:
    bodies = [BIRTH, REPORTED, WINDOW, HEALTH, WARNING]
    batch = [received(body, seq=seq) for seq, body in enumerate(bodies)]
    assert take(fleet, *batch) == set()
    with fleet.read() as connection:
        device = connection.execute(select(devices).where(devices.c.id == "w1")).one()
        kinds = connection.execute(select(messages.c.kind).order_by(messages.c.id)).scalars().all()
    assert kinds == ["birth", "reported", "window", "health", "event"]
    assert (device.online, device.boot, device.serve_url) == (True, 3, "http://127.0.0.1:9000")
    assert device.mqtt_up == sum(message.bytes_up for message in batch)
    assert row(fleet, twins).reported == {
        "desired_version": 1,
        "model": "m",
        "release": 1,
        "state": "serving",
        "error": None,
    }
    window = row(fleet, windows)
    assert msgspec.msgpack.decode(window.counts) == {"x": b"\1\2"}
    assert (window.model, window.release, window.rows) == ("m", 1, 5)
    assert row(fleet, health).body["rss"] == {"control": 1}
    alert = row(fleet, alerts)
    assert (alert.severity, alert.device, alert.text) == ("warning", "w1", "disk: 90 % full")


@pytest.mark.parametrize("body", [REPORTED, WINDOW, HEALTH, WARNING])
def test_a_repeat_changes_nothing(fleet: Store, body: Body) -> None:
    take(fleet, received(body))
    take(fleet, received(body), received(body), now=NOW + 5)
    assert size(fleet, messages) == 1
    assert size(fleet, windows) <= 1
    assert size(fleet, alerts) <= 1


def test_the_same_numbers_of_another_device_or_boot_are_no_repeat(fleet: Store) -> None:
    add_device(fleet, "w2")
    take(fleet, received(WINDOW), received(WINDOW, device="w2"), received(WINDOW, boot=4))
    assert size(fleet, windows) == 3


def test_an_older_report_that_comes_late_does_not_win(fleet: Store) -> None:
    newer = msgspec.structs.replace(REPORTED, release=2)
    take(fleet, received(newer, seq=8))
    take(fleet, received(REPORTED, seq=7))
    assert row(fleet, twins).reported["release"] == 2
    take(fleet, received(REPORTED, boot=4, seq=1))
    assert row(fleet, twins).reported["release"] == 1


def test_a_death_counts_for_its_own_boot_alone(fleet: Store) -> None:
    take(fleet, received(BIRTH, seq=1))
    assert online(fleet)
    take(fleet, received(Death(boot=2), boot=2, seq=0))
    assert online(fleet)
    take(fleet, received(Death(boot=3), seq=0))
    assert not online(fleet)


def test_a_last_will_counts_each_time_it_is_sent(fleet: Store) -> None:
    for seq in (1, 2):
        take(fleet, received(BIRTH, seq=seq))
        take(fleet, received(Death(boot=3), seq=0))
        assert not online(fleet)


def test_a_birth_of_an_earlier_boot_is_late_news(fleet: Store) -> None:
    take(fleet, received(msgspec.structs.replace(BIRTH, boot=4), boot=4))
    take(fleet, received(Death(boot=4), boot=4, seq=0))
    take(fleet, received(BIRTH, boot=3, seq=9))
    assert not online(fleet)


def test_what_the_broker_kept_from_before_is_no_sign_of_life(fleet: Store) -> None:
    take(fleet, received(BIRTH))
    with fleet.begin() as connection:
        connection.execute(update(devices).values(online=False))
    take(fleet, received(BIRTH, retained=True))
    assert not online(fleet)
    take(fleet, received(BIRTH, seq=2, retained=True))
    assert online(fleet)


def test_unknown_and_revoked_devices_are_dropped(fleet: Store) -> None:
    assert take(fleet, received(WINDOW, device="gone"), received(WINDOW, device="new")) == {
        "gone",
        "new",
    }
    assert size(fleet, messages) == 0


@pytest.mark.parametrize(
    "message",
    [
        arrived("atoll/v1/w1/desired/x", b""),
        arrived("elsewhere", b""),
        arrived("atoll/v1/w1/event", b"\xc1"),
        arrived("atoll/v1/w1/event", b""),
        incoming(WINDOW, leaf="event"),
        incoming(BIRTH, leaf="telemetry"),
        incoming(WINDOW, boot=2**63),
        incoming(WINDOW, seq=-1),
    ],
)
def test_what_cannot_be_read_says_so(message: Incoming) -> None:
    with pytest.raises(Unreadable):
        read(message)


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_not_being_readable(payload: bytes) -> None:
    with suppress(Unreadable):
        read(arrived("atoll/v1/w1/event", payload))


# The rest goes through a real broker.


@contextmanager
def speaking(running: Any, device: Any) -> Iterator[Client]:
    """Connect to the broker as a device does; yields when connected."""
    where = running.hub.context.addresses
    context = ssl.create_default_context(cadata=running.ca)
    context.load_cert_chain(device.directory / "cert.pem", device.directory / "key.pem")
    client = Client(CallbackAPIVersion.VERSION2, client_id=device.name, clean_session=True)
    client.tls_set_context(context)
    client.connect(where.mqtt_host, where.mqtt_port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def say(client: Client, device: str, body: Body, **numbers: int) -> None:
    leaf = SPOKEN[type(body)]
    info = client.publish(topic(device, leaf), envelope(body, **numbers), qos=1)  # type: ignore[arg-type]
    info.wait_for_publish(10)


def stored(running: Any, device: str) -> list[tuple[str, int]]:
    with running.hub.context.store.read() as connection:
        rows = connection.execute(
            select(messages.c.kind, messages.c.seq)
            .where(messages.c.device == device)
            .order_by(messages.c.id)
        )
        return [(kind, seq) for kind, seq in rows]


@pytest.fixture(scope="session")
def talker(running: Any) -> Any:
    return running.enrolled("talker")


def test_messages_through_the_broker_are_stored_once(
    running: Any, talker: Any, wait_until: Callable[..., None]
) -> None:
    with speaking(running, talker) as client:
        for seq in range(20):
            say(client, "talker", WINDOW, seq=seq)
            say(client, "talker", WINDOW, seq=seq)
        wait_until(lambda: len(stored(running, "talker")) >= 20, "storing")
        say(client, "talker", HEALTH, seq=99)
        wait_until(lambda: ("health", 99) in stored(running, "talker"), "the last one")
    assert len(stored(running, "talker")) == 21


def test_a_bad_message_is_counted_and_does_not_stop_the_next(
    running: Any, talker: Any, wait_until: Callable[..., None]
) -> None:
    with speaking(running, talker) as client:
        for _ in range(3):
            client.publish(topic("talker", "event"), b"\xc1", qos=1).wait_for_publish(10)
        huge = msgspec.structs.replace(WINDOW, rows=2**63)  # no database takes it
        say(client, "talker", huge, boot=50, seq=1)
        say(client, "talker", WINDOW, boot=50, seq=2)
        wait_until(lambda: ("window", 2) in stored(running, "talker")[-1:], "the good one")
    assert ("window", 1) not in stored(running, "talker")[-1:]
    assert running.hub.ingest.unreadable["talker"] == 4


def test_what_is_wanted_reaches_a_device_that_connects_later(
    running: Any, talker: Any, wait_until: Callable[..., None]
) -> None:
    store = running.hub.context.store
    with store.begin() as connection:
        assert desired.want(connection, "talker", model="m", release=7)
        assert not desired.want(connection, "talker", model="m", release=7)

    def published() -> bool:
        with store.read() as connection:
            return not desired.unpublished(connection)

    wait_until(published, "publishing")
    heard: list[Desired] = []
    with speaking(running, talker) as client:
        client.on_message = lambda _client, _data, message: heard.append(
            decode(message.payload, Desired)
        )
        client.subscribe(topic("talker", "desired"), 0)
        wait_until(lambda: bool(heard), "the retained state")
        # Not ``train``: that is the scheduler's to decide, which would take it back.
        with store.begin() as connection:
            desired.want(connection, "talker", release=8)
        wait_until(lambda: heard[-1].release == 8, "the next state")
    assert (heard[0].model, heard[0].release) == ("m", 7)
    assert heard[-1].version > heard[0].version


def test_a_revoked_device_cannot_speak_any_more(
    running: Any, wait_until: Callable[..., None]
) -> None:
    from atoll.server import enrolment

    device = running.enrolled("silenced")
    context = running.hub.context
    with speaking(running, device) as client:
        say(client, "silenced", WINDOW, seq=1)
        wait_until(lambda: len(stored(running, "silenced")) == 1, "storing")
        with context.store.begin() as connection:
            enrolment.revoke(
                connection, "silenced", actor="t", now=context.clock(), reason="stolen"
            )
        context.membership.follow()
        wait_until(lambda: not client.is_connected(), "being cut off")
