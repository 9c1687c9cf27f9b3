"""A plan without a hub: the ServerApp of every run, over a grid that is at hand.

    with opened(folder, plan_toml, devices, time.time) as run:
        ended = run.carry_out(fleet, show)

The folder is to this run what the hub's data directory is to its runs: the store with the rounds
and the privacy ledger, the checkpoint, and at the end the candidate, unsigned. So a run that was
interrupted goes on in the same folder, under any engine, and its ε counts what it had spent.
The ledger is the folder's own and knows nothing of what other runs have spent.

A folder holds one run, and its id is the same in every folder: devices draw batches and rounding
from it, so the same plan over the same devices gives the same model wherever it runs.
"""

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from flwr.serverapp import Grid
from sqlalchemy import Connection, delete, insert, select, update

from atoll.federation.exchange import Clock
from atoll.federation.plan import loads
from atoll.federation.run import RoundReport
from atoll.server import runs
from atoll.server.claims import Start
from atoll.server.errors import AlreadyRunning, Conflict
from atoll.server.recording import Recorder, SqlRecorder
from atoll.server.schema import devices as devices_table
from atoll.server.schema import runs as runs_table
from atoll.server.server_app import execute
from atoll.server.settings import Settings
from atoll.server.store import Store, sqlite_url

RUN: Final = "local"
"""The run's id."""
DATABASE: Final = "run.db"

Show = Callable[[Mapping[str, Any]], None]
"""Shown the run, as :func:`atoll.server.runs.show` returns it, after each change."""


class Device(Protocol):
    """What a hub knows of a device by its enrolment."""

    @property
    def name(self) -> str:
        """Its id."""
        ...

    @property
    def labels(self) -> Mapping[str, str]:
        """What it is chosen by."""
        ...

    @property
    def certificate(self) -> bytes:
        """PEM."""
        ...


class Fleet(Protocol):
    """Devices as an engine runs them."""

    @property
    def grid(self) -> Grid:
        """The way to them."""
        ...

    @property
    def nodes(self) -> Mapping[str, int]:
        """Flower node ids by device."""
        ...

    @property
    def clock(self) -> Clock:
        """What to wait by."""
        ...


class LocalRun:
    """The run of a folder, held by this process."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        devices: Sequence[Device],
        attempt: int,
        now: Callable[[], float],
    ) -> None:
        self._store, self._settings, self._devices = store, settings, devices
        self._attempt, self._now = attempt, now

    @property
    def resumed(self) -> bool:
        """Whether it had begun before."""
        return self._attempt > 1

    @property
    def candidate(self) -> Path | None:
        """Where the candidate is, once there is one."""
        path = self._settings.candidates / RUN
        return path if path.is_dir() else None

    def carry_out(self, fleet: Fleet, show: Show) -> dict[str, Any]:
        """Run the plan to its end and return the run as it is then.

        Raises what :func:`atoll.server.server_app.execute` does; the run can then be taken up
        again.
        """
        with self._store.begin() as connection:
            _enrol(connection, self._devices, fleet.nodes, self._now())

        def shown() -> None:
            show(self.look())

        def recorder(store: Store, run: str, now: Callable[[], float]) -> Recorder:
            return Followed(SqlRecorder(store, run, now), shown, time.monotonic)

        execute(
            fleet.grid,
            self._store,
            self._settings,
            Start(RUN, self._attempt, RUN),
            now=self._now,
            clock=fleet.clock,
            recorder=recorder,
        )
        return self.look()

    def look(self) -> dict[str, Any]:
        """Return the run as it is."""
        with self._store.read() as connection:
            return runs.show(connection, RUN)


class Followed:
    """A recorder that calls ``heard`` after each thing it hears, and takes the time of rounds.

    On the clock of the in-process engine devices take no time. ``clock`` gives seconds.
    """

    def __init__(
        self, inner: Recorder, heard: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self._inner, self._heard, self._clock = inner, heard, clock
        self._since, self._seconds = clock(), dict[int, float]()

    def stage(self, name: str) -> None:
        """Pass the stage on."""
        self._inner.stage(name)
        self._since = self._clock()
        self._heard()

    def round(self, report: RoundReport) -> None:
        """Pass the round on, with the time since the one before.

        Told again it keeps its time, and what has gone by since is that of evaluating.
        """
        now = self._clock()
        spent, before = now - self._since, self._seconds.get(report.round)
        if before is None:
            self._seconds[report.round] = spent
            report = replace(report, seconds=spent)
        else:
            report = replace(report, seconds=before, evaluate_seconds=spent)
        self._inner.round(report)
        self._since = now
        self._heard()

    def rounds_told(self) -> Sequence[RoundReport]:
        """Return every round of the run."""
        return self._inner.rounds_told()

    def record(self, facts: Mapping[str, Any]) -> None:
        """Pass on what belongs into the run's record."""
        self._inner.record(facts)
        self._heard()

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Pass facts on."""
        self._inner.metrics(facts)
        self._heard()


@contextmanager
def opened(
    folder: Path, plan_toml: str, devices: Sequence[Device], now: Callable[[], float]
) -> Iterator[LocalRun]:
    """Hold the folder for a block, and the run in it: a new one, or one that was interrupted.

    ``now`` gives Unix seconds. Raises :class:`Conflict` for a folder that holds anything else,
    and :class:`AlreadyRunning` while another process holds it.
    """
    settings = Settings(data=folder, database=sqlite_url(folder / DATABASE))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / DATABASE).exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} holds something that is no run", "give --out a new directory")
    with _held(folder):
        store = Store(settings.database_url)
        try:
            store.migrate()
            with store.begin() as connection:
                attempt = _begun(connection, folder, plan_toml, devices, now())
            yield LocalRun(store, settings, devices, attempt, now)
        finally:
            store.close()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"another process is at work on the run in {folder}",
                "wait for it, or give --out another directory",
            ) from error
        yield


def _begun(
    connection: Connection, folder: Path, plan_toml: str, devices: Sequence[Device], now: float
) -> int:
    """Add the run, or take up the one that is there; return the how-manieth start this is."""
    plan = loads(plan_toml)
    mine = runs_table.c.id == RUN
    row = connection.execute(select(runs_table).where(mine)).mappings().first()
    if row is None:
        connection.execute(
            insert(runs_table).values(
                id=RUN,
                plan=plan_toml,
                name=plan.name,
                model=plan.model,
                state="running",
                created_at=now,
                created_by=RUN,
                started_at=now,
                attempt=1,
                metrics={},
            )
        )
        return 1
    if row["state"] != "running":
        raise Conflict(f"{folder} holds a run that is {row['state']}", "give --out a new directory")
    if loads(row["plan"]) != plan:
        raise Conflict(
            f"{folder} holds a run of another plan", "run that plan, or give --out a new directory"
        )
    before = connection.execute(select(devices_table.c.id, devices_table.c.labels)).all()
    # None are there when it was interrupted before there were any.
    if before and {one.id: one.labels for one in before} != {
        device.name: dict(device.labels) for device in devices
    }:
        raise Conflict(
            f"{folder} holds a run with other devices",
            "go on with the same devices, or give --out a new directory",
        )
    attempt: int = row["attempt"] + 1
    connection.execute(update(runs_table).where(mine).values(attempt=attempt, flower_run=None))
    return attempt


def _enrol(
    connection: Connection, devices: Sequence[Device], nodes: Mapping[str, int], now: float
) -> None:
    """Write down the devices as they are now: their keys and node ids are new at each start."""
    connection.execute(delete(devices_table))
    connection.execute(
        insert(devices_table),
        [
            {
                "id": device.name,
                "labels": dict(device.labels),
                "certificate": device.certificate.decode("ascii"),
                "serial": device.name,
                "expires_at": now,
                "node_id": str(nodes[device.name]),
                "enrolled_at": now,
            }
            for device in devices
        ],
    )
