"""A program that charges a ledger and is killed while it does, again and again.

    charging.py DATABASE KILLS

Each time a child charges ``run/N``, ``run/N+1``, … of the population ``watches``, beginning with
the first that nobody was told of, until SIGKILL: for half of the times the child's own at the
n-th thing that its database does, for the other half ours as soon as we hear of so many charges,
at whatever it is just doing. After each kill a line of JSON says what the child was told in its
life and what the file holds.
"""

import json
import os
import signal
import sqlite3
import sys
import time

from sqlalchemy import event

from atoll.privacy.ledger import Gaussian, Ledger
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.store import Store, sqlite_url

EVENT = Gaussian(40.0)


def charge_from(number: int, database: str, said: int, die_at: int | None) -> None:
    """Charge until killed; write each number to ``said`` once its charge is made."""
    store = Store(sqlite_url(database))
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("begin", "before_cursor_execute", "after_cursor_execute", "commit"):
        event.listen(store.engine, name, count)
    event.listen(store.engine.pool, "checkin", count)  # after a commit
    ledger = Ledger(SqlLedgerStore(store, time.time), "watches", None, 1e-5)
    while True:
        ledger.charge(f"run/{number}", EVENT)
        os.write(said, f"{number}\n".encode())
        number += 1


def one_life(number: int, database: str, die_at: int | None, hear: int) -> list[int]:
    """Return which charges a child was told before it was killed."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        try:
            charge_from(number, database, said, die_at)
        finally:
            os._exit(1)  # nothing of the parent's runs twice
    os.close(said)
    told = []
    with os.fdopen(heard) as lines:
        while line := lines.readline():
            told.append(int(line))
            if die_at is None and len(told) == hear:
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child was to be killed"
    return told


def recorded(database: str) -> list[str]:
    """Return the charges in the file, as whoever opens it next finds them."""
    connection = sqlite3.connect(database)
    try:
        return [row[0] for row in connection.execute("SELECT charge FROM ledger ORDER BY id")]
    finally:
        connection.close()


def main(database: str, kills: int) -> None:
    """Kill so many children."""
    number = 1
    for kill in range(kills):
        # A charge is 16 things that the database does; the second is always a new one.
        die_at = 1 + kill // 2 % 32 if kill % 2 else None
        told = one_life(number, database, die_at, hear=1 + kill // 2 % 3)
        number += len(told)
        sys.stdout.write(json.dumps({"told": told, "recorded": recorded(database)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
