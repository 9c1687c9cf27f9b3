"""What ``atoll-agent outbox`` shows of the outbox."""

from pathlib import Path

import pytest

from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import DataUnwritable
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.waiting import waiting
from atoll.fleet import wire


def test_messages_are_told_in_the_order_of_sending(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db")
    outbox = Outbox(database)
    boot = outbox.start_boot()
    window = wire.Window(model="m", release=1, start=1.0, end=2.0, rows=3, counts={"x": b"123"})
    outbox.enqueue(window, 10.0)
    outbox.enqueue(wire.Event(kind="swap", severity="info"), 20.0)
    told = list(waiting(tmp_path / "agent.db", 10))
    assert [(row.boot, row.seq, row.at, row.kind) for row in told] == [
        (boot, 2, 20.0, "event"),
        (boot, 1, 10.0, "window"),
    ]
    assert all(row.bytes > 10 for row in told)
    assert [row.kind for row in waiting(tmp_path / "agent.db", 1)] == ["event"]
    database.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.db").write_bytes(b"not a database, not at all" * 100)
    with pytest.raises(DataUnwritable, match=r"agent\.db"):
        list(waiting(tmp_path / "agent.db", 10))
