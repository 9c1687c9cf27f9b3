"""A run's life at the hub: proposed, approved by a person, started with Flower, settled.

Between ``running`` and the end, the run's own process (:mod:`atoll.server.server_app`) writes
what it finds into the same rows; here a run is only started, watched, and settled when it ends
without having said how. Everything is looked up anew at each tick, so a hub that was killed in
the middle goes on where it was.
"""

import logging
import secrets
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, insert, select, update

from atoll.federation import release
from atoll.federation.errors import BadPlan, LinkError
from atoll.federation.plan import Plan, loads
from atoll.privacy.errors import BadParameters
from atoll.server import audit, desired
from atoll.server.auth import Operator
from atoll.server.context import Clock, Nodes
from atoll.server.errors import BadInput, Conflict, Forbidden, NotFound
from atoll.server.schema import devices, runs, twins
from atoll.server.store import Store

log = logging.getLogger(__name__)

SERVER_APP: Final = "atoll.server.server_app:app"
RUN_KEY: Final = "run"
"""The key of ``run_config`` under which the ServerApp finds the run's id."""


def propose(
    connection: Connection, plan_toml: str, *, actor: str, now: float, reason: str = ""
) -> str:
    """Add a run that waits for approval; return its id. Raises :class:`BadInput`."""
    plan = read_plan(plan_toml)
    _check_population(connection, plan)
    run = secrets.token_hex(6)
    connection.execute(
        insert(runs).values(
            id=run,
            plan=plan_toml,
            name=plan.name,
            model=plan.model,
            state="proposed",
            reason=reason,
            created_at=now,
            created_by=actor,
            metrics={},
        )
    )
    audit.record(connection, actor, "run.propose", run, now, name=plan.name, reason=reason)
    return run


def approve(connection: Connection, run: str, *, operator: Operator, now: float) -> None:
    """Let a proposed run start.

    Nobody approves a run of their own, an admin aside, and the audit log then says so.
    Raises :class:`NotFound`, :class:`Forbidden` or :class:`Conflict`.
    """
    operator.require("approver")
    row = _row(connection, run)
    own = row["created_by"] == operator.name
    if own and not operator.may("admin"):
        raise Forbidden(
            "a run is approved by someone else than who proposed it",
            "ask another approver",
            code="four-eyes",
        )
    _move(connection, row, ("proposed",), "approved", approved_by=operator.name)
    audit.record(connection, operator.name, "run.approve", run, now, own=own, plan=row["plan"])


def cancel(connection: Connection, run: str, *, actor: str, now: float) -> str | None:
    """End a run for good; return the Flower run to stop, if there is one.

    Raises :class:`NotFound` or :class:`Conflict`.
    """
    row = _row(connection, run)
    _move(connection, row, ("proposed", "approved", "running"), "cancelled", ended_at=now)
    audit.record(connection, actor, "run.cancel", run, now)
    flower: str | None = row["flower_run"]
    return flower


def read_plan(plan_toml: str) -> Plan:
    """Return the plan; raise :class:`BadInput` unless it can be run here."""
    try:
        plan = loads(plan_toml)
    except BadPlan as error:
        raise BadInput(f"the plan cannot be run: {error}", "edit the plan") from error
    try:
        release.check(plan)
    except BadParameters as error:
        raise BadInput(f"the plan cannot be run: {error}", "edit the plan") from error
    known = sorted(entry_points(group="atoll.tasks").names)
    if plan.task not in known:
        raise BadInput(
            f"no task named {plan.task!r} is installed on the hub (there are: {', '.join(known)})",
            "install the package that offers it on hub and devices",
        )
    return plan


def _check_population(connection: Connection, plan: Plan) -> None:
    """Refuse a plan that promises nothing to the fleet, once the fleet is large enough for it."""
    labels = connection.execute(select(devices.c.labels).where(devices.c.revoked_at.is_(None)))
    trainers = sum(plan.cohort.labels.items() <= row.labels.items() for row in labels)
    if trainers < plan.cohort.min_devices:
        return
    try:
        release.check_population(plan, trainers)
    except BadParameters as error:
        raise BadInput(f"the plan cannot be run: {error}", "edit the plan") from error


class Runner:
    """Starts approved runs one after another and settles those that Flower has ended."""

    def __init__(self, store: Store, nodes: Nodes, clock: Clock) -> None:
        self._store = store
        self._nodes = nodes
        self._clock = clock

    def recover(self) -> None:
        """Settle the run that was being started when the hub went down, if there is one."""
        with self._store.begin() as connection:
            connection.execute(
                update(runs)
                .where(runs.c.state == "running", runs.c.flower_run.is_(None))
                .values(
                    state="failed",
                    ended_at=self._clock(),
                    reason="the hub stopped while it was starting the run; propose it again",
                )
            )

    def tick(self) -> bool:
        """Look at all runs once; return whether anything changed.

        Raises :class:`LinkError` when the SuperLink does not answer.
        """
        with self._store.read() as connection:
            running = connection.execute(_in_state("running")).mappings().all()
            approved = connection.execute(_in_state("approved")).mappings().first()
        changed = [self._settle(row) for row in running]
        with self._store.begin() as connection:
            changed.append(open_training(connection, wanted=bool(running) or approved is not None))
        if approved is not None and not running:
            self._start(approved)
            changed.append(True)
        return any(changed)

    def _start(self, row: RowMapping) -> None:
        with self._store.begin() as connection:
            started = connection.execute(
                update(runs)
                .where(runs.c.id == row["id"], runs.c.state == "approved")
                .values(state="running", started_at=self._clock(), reason="")
            )
            if started.rowcount == 0:  # cancelled meanwhile
                return
        try:
            flower = self._nodes.start_run(SERVER_APP, {RUN_KEY: row["id"]})
        except LinkError as error:
            self._update(row["id"], "running", {"state": "approved", "reason": str(error)})
            raise
        if not self._update(row["id"], "running", {"flower_run": flower}):
            self._nodes.stop_run(flower)  # cancelled meanwhile

    def _settle(self, row: RowMapping) -> bool:
        flower = row["flower_run"]
        if flower is None:
            return False
        status = self._nodes.run_status(flower)
        if status.state != "finished":
            return False
        ending = _ending(status.outcome, status.detail)
        return self._update(row["id"], "running", ending | {"ended_at": self._clock()})

    def _update(self, run: str, state: str, values: Mapping[str, Any]) -> bool:
        """Change a run if it still is in ``state``: its own process may have moved it on."""
        with self._store.begin() as connection:
            changed = connection.execute(
                update(runs).where(runs.c.id == run, runs.c.state == state).values(**values)
            )
            return changed.rowcount > 0


def open_training(connection: Connection, *, wanted: bool) -> bool:
    """Open or close the training window of every device; return whether any changed.

    All devices take part in a run: those with the plan's labels train, all evaluate.
    """
    rows = connection.execute(
        select(twins.c.device, twins.c.desired)
        .join(devices, devices.c.id == twins.c.device)
        .where(devices.c.revoked_at.is_(None))
    ).all()
    stale = [row.device for row in rows if bool(row.desired.get("train")) != wanted]
    for device in stale:
        desired.want(connection, device, train=wanted)
    return bool(stale)


def _ending(outcome: str, detail: str) -> dict[str, Any]:
    if outcome == "stopped":
        return {"state": "cancelled", "reason": "the run was stopped"}
    said = "failed" if outcome == "failed" else "ended without a result"
    reason = f"the run's process {said}; see the executor's log in the hub's data directory"
    return {"state": "failed", "reason": f"{reason} ({detail})" if detail else reason}


def _in_state(state: str) -> Any:  # noqa: ANN401  a Select of all the columns
    return select(runs).where(runs.c.state == state).order_by(runs.c.created_at)


def _row(connection: Connection, run: str) -> RowMapping:
    row = connection.execute(select(runs).where(runs.c.id == run)).mappings().first()
    if row is None:
        raise NotFound(f"there is no run {run!r}", "see the list of runs")
    return row


def _move(
    connection: Connection,
    row: RowMapping,
    before: tuple[str, ...],
    after: str,
    **values: str | float,
) -> None:
    moved = connection.execute(
        update(runs)
        .where(runs.c.id == row["id"], runs.c.state.in_(before))
        .values(state=after, **values)
    )
    if moved.rowcount == 0:
        raise Conflict(f"run {row['id']} is {row['state']}", "look at it again")
