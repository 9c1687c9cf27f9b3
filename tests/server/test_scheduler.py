"""The scheduler's duties: each gets its turn whatever the others do."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from atoll.fleet.authority import Authority
from atoll.privacy.errors import BudgetExceeded
from atoll.privacy.ledger import Gaussian, Ledger
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.membership import Fleet
from atoll.server.scheduler import Duty, Scheduler, mark_silent
from atoll.server.schema import devices, dropped_nodes
from atoll.server.store import Store
from atoll.server.supervisor import Address, Child


def add(store: Store, name: str, **columns: Any) -> None:
    values: dict[str, Any] = {
        "id": name,
        "labels": {},
        "certificate": "",
        "serial": name,
        "expires_at": 0.0,
        "enrolled_at": 0.0,
    }
    with store.begin() as connection:
        connection.execute(insert(devices).values(**(values | columns)))


def test_a_duty_that_fails_does_not_keep_the_others_from_their_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("broken")

    scheduler = Scheduler([Duty("bad", fail), Duty("good", lambda: done.append("good"))])
    with caplog.at_level(logging.INFO):
        for now in range(3):
            scheduler.turn(float(now))
    assert done == ["good"] * 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # said once


def test_a_duty_that_works_again_says_so(caplog: pytest.LogCaptureFixture) -> None:
    broken = [True]

    def flaky() -> None:
        if broken:
            raise RuntimeError("broken")

    scheduler = Scheduler([Duty("flaky", flaky)])
    with caplog.at_level(logging.INFO):
        scheduler.turn(0.0)
        broken.clear()
        scheduler.turn(1.0)
    assert caplog.messages[-1] == "flaky works again"


def test_duties_keep_their_own_time() -> None:
    done: list[str] = []
    scheduler = Scheduler(
        [Duty("fast", lambda: done.append("f")), Duty("slow", lambda: done.append("s"), every=10)]
    )
    for now in (0.0, 1.0, 9.0, 10.0):
        scheduler.turn(now)
    assert "".join(done) == "fsfffs"


def test_it_stops_at_once() -> None:
    called = threading.Event()
    scheduler = Scheduler([Duty("one", called.set)], interval=0.01)
    scheduler.start()
    assert called.wait(5)
    scheduler.stop()


def test_silent_devices_count_as_offline(store: Store, clock: Any) -> None:
    add(store, "loud", online=True, last_seen=clock() - 10)
    add(store, "silent", online=True, last_seen=clock() - 100)
    assert mark_silent(store, clock, 90.0) == 1
    with store.read() as connection:
        online = connection.execute(select(devices.c.id).where(devices.c.online)).scalars().all()
    assert online == ["loud"]


class ListedBroker:
    """A broker that only remembers the configurations it was given."""

    def __init__(self) -> None:
        self.written: list[tuple[set[str], set[str]]] = []
        self.reloads = 0
        self.full = False

    address = Address("127.0.0.1", 1)
    client_id = "hub"

    def write_config(self, listed: Any, revoked: Any = ()) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.written.append((set(listed), set(revoked)))

    def child(self) -> Child | None:
        return None

    def reload(self, pid: int | None) -> None:
        self.reloads += 1


@pytest.fixture
def broker() -> ListedBroker:
    return ListedBroker()


@pytest.fixture
def fleet(store: Store, broker: ListedBroker, nodes: Any, clock: Any) -> Fleet:
    from atoll.federation.errors import LinkError

    return Fleet(store, broker, lambda: 1, nodes, clock, refused=LinkError)


def certificate(authority: Authority, device: Any, clock: Any) -> str:
    return authority.issue_device(device.csr().encode(), device.name, clock.utc()).decode()


def test_the_broker_is_told_only_what_has_changed(
    store: Store, fleet: Fleet, broker: ListedBroker
) -> None:
    add(store, "in", node_id="1")
    add(store, "out", revoked_at=1.0, serial="ab", previous_serial="cd")
    fleet.follow()
    fleet.follow()
    assert broker.written == [({"in"}, {"ab", "cd"})]
    assert broker.reloads == 1


def test_a_full_disk_is_tried_again(
    store: Store, fleet: Fleet, broker: ListedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.full = True
    fleet.follow()
    assert "No space left" in caplog.text
    broker.full = False
    fleet.follow()
    assert broker.written == [(set(), set())]


def test_nodes_are_registered_and_dropped_when_the_superlink_is_back(
    store: Store,
    fleet: Fleet,
    nodes: Any,
    clock: Any,
    authority: Authority,
    new_device: Callable[[str], Any],
) -> None:
    device = new_device("w1")
    add(store, "w1", certificate=certificate(authority, device, clock))
    nodes.registered["77"] = b"old"
    with store.begin() as connection:
        connection.execute(insert(dropped_nodes).values(node_id="77", device="old", at=0.0))
    nodes.down = True
    fleet.follow()
    nodes.down = False
    fleet.follow()
    with store.read() as connection:
        node = connection.execute(select(devices.c.node_id)).scalar_one()
        assert connection.execute(select(dropped_nodes)).all() == []
    assert nodes.registered == {node: device.identity.public_pem()}


def test_a_device_revoked_while_it_is_registered_is_dropped_again(
    store: Store,
    fleet: Fleet,
    nodes: Any,
    clock: Any,
    authority: Authority,
    new_device: Callable[[str], Any],
) -> None:
    add(store, "w1", certificate=certificate(authority, new_device("w1"), clock))
    register = nodes.register_node

    def revoked_meanwhile(key: bytes) -> str:
        with store.begin() as connection:
            connection.execute(update(devices).values(revoked_at=1.0))
        return str(register(key))

    nodes.register_node = revoked_meanwhile
    fleet.follow()
    fleet.follow()
    assert nodes.registered == {}


def test_the_ledger_charges_once_and_refuses_in_the_same_transaction(
    store: Store, clock: Any, together: Callable[..., None]
) -> None:
    held = SqlLedgerStore(store, clock)
    ledger = Ledger(held, "m", 5.0, 1e-5)
    event = Gaussian(4.0)
    together(3, lambda _: ledger.charge("run/1", event))
    assert [charge for charge, _ in held.events("m")] == ["run/1"]
    assert ledger.spent() == Ledger(SqlLedgerStore(store, clock), "m", None, 1e-5).spent()
    with pytest.raises(BudgetExceeded):
        ledger.charge("run/2", Gaussian(0.1))
    assert [charge for charge, _ in held.events("m")] == ["run/1"]
    assert held.events("other") == []


def test_of_charges_at_once_only_those_that_fit_are_taken(
    tmp_path: Path, store: Store, clock: Any, together: Callable[..., None]
) -> None:
    held = SqlLedgerStore(store, clock)
    budget = Ledger(held, "m", None, 1e-5).after(*[Gaussian(4.0)] * 2).epsilon_pld + 1e-6
    refused: list[int] = []

    def charge(number: int) -> None:
        try:
            Ledger(held, "m", budget, 1e-5).charge(f"run/{number}", Gaussian(4.0))
        except BudgetExceeded:
            refused.append(number)

    together(5, charge)
    assert len(held.events("m")) == 2
    assert len(refused) == 3
