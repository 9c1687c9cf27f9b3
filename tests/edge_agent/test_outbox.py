import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError, DataUnwritable, DiskFull
from atoll.edge_agent.outbox import Outbox
from atoll.fleet import wire


def event(size: int = 10) -> wire.Event:
    return wire.Event(kind="test", severity="info", detail="x" * size)


def window(size: int = 10) -> wire.Window:
    return wire.Window(
        model="m", release=1, start=0.0, end=1.0, rows=1, counts={"v": b"\x01" * size}
    )


def health() -> wire.Health:
    return wire.Health(
        rss={}, disk_free=0, outbox_waiting=0, outbox_dropped=0, bytes_up=0, bytes_down=0
    )


@pytest.fixture
def outbox(tmp_path: Path):
    database = Database(tmp_path / "agent.db")
    box = Outbox(database)
    box.start_boot()
    yield box
    database.close()


def idents(box: Outbox) -> list[tuple[int, int]]:
    found = [wire.decode(item.payload, wire.Envelope) for item in box.waiting(10_000)]
    return [(one.boot, one.seq) for one in found]


def test_a_message_stays_until_it_is_settled(outbox):
    outbox.enqueue(event(), 1.0)
    item = outbox.waiting(5)[0]
    assert outbox.waiting(5)[0] == item
    assert outbox.waiting(5, {item.id}) == []
    outbox.settle([item.id])
    assert outbox.waiting(5) == []
    assert outbox.counts() == (0, 0, 0)


def test_births_go_first_and_events_before_windows_before_health(outbox):
    outbox.enqueue(health(), 0.0)
    outbox.enqueue(window(), 0.0)
    outbox.enqueue(event(), 0.0)
    outbox.enqueue(wire.Reported(desired_version=1, model=None, release=None, state="idle"), 0.0)
    outbox.enqueue(wire.Birth(boot=1, agent_version="0"), 0.0)
    kinds = [
        type(wire.decode(item.payload, wire.Envelope).body).__name__ for item in outbox.waiting(9)
    ]
    assert kinds == ["Birth", "Reported", "Event", "Window", "Health"]


def test_only_status_is_retained(outbox):
    outbox.enqueue(wire.Birth(boot=1, agent_version="0"), 0.0)
    outbox.enqueue(event(), 0.0)
    assert [item.retain for item in outbox.waiting(9)] == [True, False]


def test_boots_are_numbered_across_restarts_and_sequences_begin_anew(tmp_path):
    for boot in (1, 2, 3):
        database = Database(tmp_path / "agent.db")
        box = Outbox(database)
        assert box.start_boot() == boot
        box.enqueue(event(), 0.0)
        database.close()
    database = Database(tmp_path / "agent.db")
    assert idents(Outbox(database)) == [(1, 1), (2, 1), (3, 1)]
    database.close()


def test_a_reserved_will_shares_its_number_with_nothing(outbox):
    will = wire.decode(outbox.reserve(wire.Death(boot=1), 0.0), wire.Envelope)
    outbox.enqueue(event(), 0.0)
    assert (will.boot, will.seq) == (1, 1)
    assert idents(outbox) == [(1, 2)]


def test_full_outbox_drops_windows_and_keeps_events(tmp_path):
    database = Database(tmp_path / "agent.db")
    box = Outbox(database, quota=2000)
    box.start_boot()
    for _ in range(10):
        box.enqueue(window(100), 0.0)
    for _ in range(20):
        assert box.enqueue(event(100), 0.0)
    assert box.counts().dropped == 30 - box.counts().waiting
    bodies = [wire.decode(item.payload, wire.Envelope).body for item in box.waiting(99)]
    assert not any(isinstance(body, wire.Window) for body in bodies)
    assert not box.enqueue(window(100), 0.0), "a window must not push an event out"
    database.close()


def test_two_processes_may_enqueue_at_once_without_sharing_a_number(tmp_path):
    path = tmp_path / "agent.db"
    database = Database(path)
    box = Outbox(database)
    box.start_boot()
    writer = f"""
from pathlib import Path
from atoll.edge_agent.database import Database
from atoll.edge_agent.outbox import Outbox
from atoll.fleet.wire import Event
box = Outbox(Database(Path({str(path)!r})))
for _ in range(40):
    box.enqueue(Event(kind="other", severity="info"), 0.0)
"""
    other = subprocess.Popen([sys.executable, "-c", writer])
    for _ in range(40):
        box.enqueue(event(), 0.0)
    assert other.wait(60) == 0
    assert sorted(idents(box)) == [(1, seq) for seq in range(1, 81)]
    database.close()


@pytest.mark.parametrize("round_", range(3))
def test_nothing_acknowledged_to_the_writer_is_lost_when_it_is_killed(tmp_path, round_):
    path = tmp_path / "agent.db"
    writer = f"""
import sys
from pathlib import Path
from atoll.edge_agent.database import Database
from atoll.edge_agent.outbox import Outbox
from atoll.fleet.wire import Event
box = Outbox(Database(Path({str(path)!r})))
box.start_boot()
n = 0
while True:
    n += 1
    box.enqueue(Event(kind="k", severity="info", detail=str(n)), 0.0)
    sys.stdout.write(f"{{n}}\\n"); sys.stdout.flush()
"""
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE)
    assert process.stdout is not None
    told = 0
    end = time.monotonic() + 30
    while told < 20 + 7 * round_ and time.monotonic() < end:
        told = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    told = max([told, *(int(line) for line in rest)])
    database = Database(path)
    box = Outbox(database)
    found = [wire.decode(item.payload, wire.Envelope) for item in box.waiting(100_000)]
    numbers = [int(one.body.detail) for one in found if isinstance(one.body, wire.Event)]
    assert numbers[:told] == list(range(1, told + 1))
    assert len(numbers) <= told + 1
    assert [one.seq for one in found] == list(range(1, len(found) + 1))
    assert box.counts().bytes == sum(len(item.payload) for item in box.waiting(100_000))
    assert box.start_boot() == 2
    database.close()


def test_a_directory_in_its_place_is_told_in_a_sentence(tmp_path):
    (tmp_path / "agent.db").mkdir()
    with pytest.raises(DataUnwritable, match="--data"):
        Database(tmp_path / "agent.db")


def test_a_damaged_file_is_told_in_a_sentence(tmp_path):
    (tmp_path / "agent.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(AgentError, match="move it away"):
        Database(tmp_path / "agent.db")


class Machine(RuleBasedStateMachine):
    """The outbox against a plain model of it: nothing lost, nothing twice, quota kept."""

    QUOTA = 1500

    @initialize()
    def open(self) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.database = Database(Path(self.directory.name) / "agent.db")
        self.box = Outbox(self.database, self.QUOTA)
        self.boot = self.box.start_boot()
        self.given = 0
        self.settled: set[tuple[int, int]] = set()

    @rule(
        body=st.one_of(
            st.builds(event, st.integers(0, 300)), st.builds(window, st.integers(0, 300))
        )
    )
    def enqueue(self, body: wire.Body) -> None:
        events = self.count(wire.Event)
        self.box.enqueue(body, 0.0)
        self.given += 1
        if isinstance(body, wire.Window):
            assert self.count(wire.Event) == events, "a window pushed an event out"

    @rule(n=st.integers(1, 5))
    def settle(self, n: int) -> None:
        items = self.box.waiting(n)
        self.settled |= {
            (one.boot, one.seq)
            for one in (wire.decode(item.payload, wire.Envelope) for item in items)
        }
        self.box.settle([item.id for item in items])

    @rule()
    def restart(self) -> None:
        self.database.close()
        self.database = Database(Path(self.directory.name) / "agent.db")
        self.box = Outbox(self.database, self.QUOTA)
        self.boot = self.box.start_boot()

    def count(self, kind: type) -> int:
        return sum(
            isinstance(wire.decode(item.payload, wire.Envelope).body, kind)
            for item in self.box.waiting(1000)
        )

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "box"):
            return
        counts = self.box.counts()
        waiting = idents(self.box)
        assert len(set(waiting)) == len(waiting) == counts.waiting
        assert not self.settled & set(waiting), "a settled message came back"
        assert counts.bytes == sum(len(item.payload) for item in self.box.waiting(1000))
        assert counts.bytes <= self.QUOTA
        assert self.given == counts.waiting + len(self.settled) + counts.dropped

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
            self.directory.cleanup()


Machine.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMachine = Machine.TestCase


@given(st.lists(st.integers(0, 60), max_size=12))
@settings(max_examples=15)
def test_settling_what_is_gone_changes_nothing(ids):
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        database = Database(Path(directory) / "agent.db")
        box = Outbox(database)
        box.start_boot()
        box.enqueue(event(), 0.0)
        kept = {item.id for item in box.waiting(5)} - set(ids)
        box.settle(ids)
        box.settle(ids)
        assert {item.id for item in box.waiting(5)} == kept
        assert (box.counts().bytes == 0) == (not kept)
        database.close()


def test_a_full_disk_is_told_and_nothing_is_half_written(outbox):
    outbox.enqueue(event(), 0.0)
    before = outbox.counts()
    connection = outbox._database._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(DiskFull, match="free some space"):
        outbox.enqueue(event(100_000), 0.0)
    assert outbox.counts() == before
    connection.execute("PRAGMA max_page_count=1000000")
    assert outbox.enqueue(event(), 0.0)
    assert idents(outbox) == [(1, 1), (1, 2)]


def test_boots_go_on_from_what_the_hub_knew_of_the_name(tmp_path: Path) -> None:
    outbox = Outbox(Database(tmp_path / "agent.db"))
    assert [outbox.start_boot(41), outbox.start_boot(41), outbox.start_boot()] == [42, 43, 44]
