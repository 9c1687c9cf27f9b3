"""The ledger in the hub's database: the contract of every store, and what a kill leaves."""

import json
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from hypothesis.stateful import rule
from sqlalchemy import delete, select

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "contracts"))

from charging import EVENT  # after the path
from ledger_store import LedgerMachine, keeps_the_contract

from atoll.privacy.accounting import spent
from atoll.privacy.errors import BadParameters
from atoll.privacy.ledger import Gaussian, Ledger
from atoll.server import schema
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.store import Store, sqlite_url

KILLS = 96


class SqliteMachine(LedgerMachine):
    """Over a file that is opened anew from time to time, as by a process that restarts."""

    def __init__(self, path):
        self.path = path
        self.database = Store(sqlite_url(path))
        super().__init__(SqlLedgerStore(self.database, lambda: 0.0))

    @rule()
    def restart(self):
        self.database.close()
        self.database = Store(sqlite_url(self.path))
        self.store = SqlLedgerStore(self.database, lambda: 0.0)

    def teardown(self):
        self.database.close()
        self.path.unlink()


def test_the_store_in_sqlite_keeps_the_contract(tmp_path):
    empty = tmp_path / "empty.db"
    database = Store(sqlite_url(empty))
    database.migrate()
    database.close()
    numbers = count()

    def machine():
        return SqliteMachine(Path(shutil.copy(empty, tmp_path / f"{next(numbers)}.db")))

    keeps_the_contract(machine)


def test_the_store_in_postgresql_keeps_the_contract(postgres):
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE DATABASE contract")
    database = Store(postgres.removesuffix("/postgres") + "/contract")
    database.migrate()

    def machine():
        with database.begin() as connection:
            connection.execute(delete(schema.ledger))
        return LedgerMachine(SqlLedgerStore(database, lambda: 0.0))

    keeps_the_contract(machine, examples=10)
    database.close()


def rows(store):
    with store.read() as connection:
        return connection.execute(select(schema.ledger).order_by(schema.ledger.c.id)).all()


def test_a_charge_that_was_told_outlives_a_kill_at_any_instant_and_is_made_once(tmp_path):
    path = tmp_path / "hub.db"
    store = Store(sqlite_url(path))
    store.migrate()
    store.close()
    program = Path(__file__).with_name("charging.py")
    done = subprocess.run(
        [sys.executable, program, path, str(KILLS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lives) == KILLS

    told: list[int] = []
    unheard = 0
    for life in lives:
        told += life["told"]
        # All that were told, in order, none twice; and at most one that was just made.
        made = len(life["recorded"])
        assert life["recorded"] == [f"run/{number}" for number in range(1, made + 1)]
        assert told == list(range(1, len(told) + 1))
        assert made - len(told) in (0, 1)
        unheard += made - len(told)
    assert 0 < unheard < KILLS  # both sides of the instant between commit and word were met

    store = Store(sqlite_url(path))
    before = rows(store)
    held = SqlLedgerStore(store, lambda: 0.0)
    ledger = Ledger(held, "watches", None, 1e-5)
    made = len(before)
    for number in range(1, made + 1):
        assert ledger.charge(f"run/{number}", EVENT) == spent([EVENT] * made, 1e-5)
    with pytest.raises(BadParameters, match="charge id of its own"):
        ledger.charge("run/1", Gaussian(41.0))
    assert rows(store) == before
    store.close()
