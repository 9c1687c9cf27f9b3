"""Where the hub keeps its tables: one engine, migrations, and transactions.

SQLite (WAL) when embedded, PostgreSQL by URL. Several processes open the same SQLite file
(the hub and the ServerApp of a run), so a writer takes its lock at ``BEGIN IMMEDIATE`` and
waits for it there: a transaction that has begun never fails for another writer's sake.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from atoll.server.errors import StoreUnusable

BUSY_SECONDS: Final = 15
_READ: Final = "atoll_read"
_MIGRATION_LOCK: Final = 0x61746F6C6C  # "atoll", the key of a PostgreSQL advisory lock


def sqlite_url(path: Path) -> str:
    """Return the URL of the embedded database at ``path``."""
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


class Store:
    """The hub's database.

    ``begin()`` is for transactions that may write, ``read()`` for those that do not; both
    give a SQLAlchemy ``Connection`` and commit at the end of the block, or roll back when it
    raises. Connections are pooled and may be used from any thread, one thread at a time.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)

    @property
    def sqlite(self) -> bool:
        """Whether this is the embedded database."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a transaction that may write; on SQLite it holds the write lock from here on."""
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads; it sees one snapshot and blocks no writer."""
        with (
            self.engine.connect().execution_options(**{_READ: True}) as connection,
            connection.begin(),
        ):
            yield connection

    def migrate(self) -> None:
        """Bring the tables to this version's schema, creating them in an empty database.

        Safe when several processes do it at once. Raises :class:`StoreUnusable`.
        """
        try:
            with self.begin() as connection:
                if not self.sqlite:
                    connection.execute(
                        text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK}
                    )
                command.upgrade(migration_config(connection), "head")
        except CommandError as error:
            raise StoreUnusable(
                f"the database {self._name} is of another version of Atoll ({error})",
                "start the version that wrote it, or a newer one",
            ) from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            raise StoreUnusable(
                f"cannot use the database {self._name}: {str(cause).strip()}",
                "check that it exists, is writable and has room",
            ) from error

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    @property
    def _name(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)


def migration_config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration, over the migrations that lie beside this module."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    return config


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(parsed)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(parsed, pool_size=16, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise StoreUnusable(
            f"cannot open the database {url!r}: {error}",
            "give a URL such as postgresql://user:password@host/name, "
            "and install atoll[postgres] for PostgreSQL",
        ) from error


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, pool_size=16, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:  # noqa: ANN401  a pool record of SQLAlchemy's, unused
        connection.isolation_level = None  # we say BEGIN ourselves
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {BUSY_SECONDS * 1000}",
            "journal_mode = WAL",
            # A message is acknowledged to the device after the commit, so the commit must
            # be on the disk and not in a cache.
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get(_READ, False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
