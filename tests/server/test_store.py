"""The hub's store: migrations, and several writers at once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from atoll.server import record
from atoll.server.errors import StoreUnusable
from atoll.server.recording import SqlRecorder
from atoll.server.schema import devices, metadata, operators, rounds, runs, windows
from atoll.server.store import Store, migration_config, sqlite_url

Together = Callable[[int, Callable[[int], object]], None]


def differences(store: Store) -> list[object]:
    with store.begin() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))


def test_migrating_an_empty_database_gives_the_schema(store: Store) -> None:
    assert differences(store) == []


def test_migrating_an_empty_postgresql_database_gives_the_schema(postgres: str) -> None:
    store = Store(postgres)
    store.migrate()
    store.migrate()
    assert differences(store) == []
    with store.begin() as connection:
        assert "devices" in inspect(connection).get_table_names()
    store.close()


def test_processes_may_migrate_at_once(tmp_path: Path, together: Together) -> None:
    stores = [Store(sqlite_url(tmp_path / "hub.db")) for _ in range(3)]
    together(3, lambda number: stores[number].migrate())
    assert differences(stores[0]) == []
    for store in stores:
        store.close()


def test_windows_from_before_there_was_noise_have_none(tmp_path: Path) -> None:
    store = Store(sqlite_url(tmp_path / "hub.db"))
    with store.begin() as connection:
        command.upgrade(migration_config(connection), "0001")
        for statement in (
            """INSERT INTO devices VALUES
            ('w', '{}', '', '1', NULL, 0, NULL, 0, NULL, 1, 1, NULL, NULL, NULL, 0, 0, 0)""",
            "INSERT INTO messages VALUES (1, 'w', 1, 1, 0, 0, 'window', x'')",
            "INSERT INTO windows VALUES (1, 'w', 'm', 1, 0, 0, 1, 5, x'80')",
        ):
            connection.execute(text(statement))
    store.migrate()
    assert differences(store) == []
    with store.read() as connection:
        assert connection.execute(select(windows.c.noise, windows.c.rows)).all() == [(0.0, 5)]
    store.close()


def test_runs_from_before_they_were_counted_were_never_taken_up(tmp_path: Path) -> None:
    store = Store(sqlite_url(tmp_path / "hub.db"))
    with store.begin() as connection:
        command.upgrade(migration_config(connection), "0002")
        connection.execute(
            text(
                "INSERT INTO runs (id, plan, name, model, state, reason, created_at, created_by,"
                " stage, metrics) VALUES ('r', '', 'n', 'm', 'running', '', 1, 'me', '', '{}')"
            )
        )
    store.migrate()
    assert differences(store) == []
    with store.read() as connection:
        assert connection.execute(select(runs.c.attempt, runs.c.stalled)).all() == [(0, 0)]
    store.close()


def test_rounds_from_before_their_bytes_were_stored_are_kept(tmp_path: Path) -> None:
    store = Store(sqlite_url(tmp_path / "hub.db"))
    with store.begin() as connection:
        command.upgrade(migration_config(connection), "0003")
        for statement in (
            """INSERT INTO runs (id, plan, name, model, state, reason, created_at, created_by,
            stage, metrics) VALUES ('r', '', 'n', 'm', 'gated', '', 1, 'me', '', '{}')""",
            "INSERT INTO rounds VALUES ('r', 1, 1, 2, '[\"a\"]', '{\"b\": \"late\"}', 0.5, NULL)",
        ):
            connection.execute(text(statement))
    store.migrate()
    assert differences(store) == []
    [told] = SqlRecorder(store, "r", lambda: 0.0).rounds_told()
    assert (told.survivors, dict(told.dropped), told.loss) == (("a",), {"b": "late"}, 0.5)
    assert (told.bytes_up, told.drawn, told.lost, told.accuracy) == (0, 0, False, None)
    with store.read() as connection:
        assert connection.execute(select(rounds.c.bytes_up, rounds.c.lost)).all() == [(None, False)]
        assert (
            json.loads(record.encode(record.document(connection, "r")))["rounds"][0]["drawn"] == 2
        )
    store.close()


def test_a_database_of_a_newer_version_is_refused(store: Store) -> None:
    with store.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreUnusable, match="another version"):
        store.migrate()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub.db").write_bytes(b"no database at all" * 100)
    store = Store(sqlite_url(tmp_path / "hub.db"))
    with pytest.raises(StoreUnusable, match="not a database"):
        store.migrate()
    store.close()


@pytest.mark.parametrize("url", ["nonsense", "oracle+none://x/y"])
def test_a_url_that_names_no_database_is_refused(url: str) -> None:
    with pytest.raises(StoreUnusable, match="cannot open"):
        Store(url)


def test_writers_wait_for_each_other_and_lose_nothing(tmp_path: Path, together: Together) -> None:
    stores = [Store(sqlite_url(tmp_path / "hub.db")) for _ in range(2)]  # as two processes
    stores[0].migrate()
    with stores[0].begin() as connection:
        connection.execute(
            insert(operators).values(name="a", role="admin", token_sha256="x", created_at=0.0)
        )

    def count_up(number: int) -> None:
        for _ in range(10):
            with stores[number % 2].begin() as connection:
                at = connection.execute(select(operators.c.created_at)).scalar_one()
                connection.execute(update(operators).values(created_at=at + 1))

    together(4, count_up)
    with stores[1].read() as connection:
        assert connection.execute(select(operators.c.created_at)).scalar_one() == 40
    for store in stores:
        store.close()


def test_a_reader_sees_one_snapshot_and_blocks_no_writer(store: Store) -> None:
    with store.read() as reader:
        assert reader.execute(select(operators.c.name)).all() == []
        with store.begin() as writer:
            writer.execute(
                insert(operators).values(name="a", role="admin", token_sha256="x", created_at=0.0)
            )
        assert reader.execute(select(operators.c.name)).all() == []
    with store.read() as reader:
        assert reader.execute(select(operators.c.name)).scalars().all() == ["a"]


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.begin() as connection:
            connection.execute(
                insert(operators).values(name="a", role="admin", token_sha256="x", created_at=0.0)
            )
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with store.read() as connection:
        assert connection.execute(select(operators.c.name)).all() == []


def test_foreign_keys_are_enforced(store: Store) -> None:
    with pytest.raises(IntegrityError), store.begin() as connection:
        connection.execute(text("INSERT INTO twins VALUES ('nobody', 0, '{}', 0, NULL, NULL)"))


def test_commits_are_on_the_disk(store: Store) -> None:
    with store.begin() as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
        assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(select(devices)).all() == []
