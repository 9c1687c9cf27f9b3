"""A run's life at the hub: proposed, approved by a person, started with Flower, settled.

Between ``running`` and the end, the run's own process (:mod:`atoll.server.server_app`) writes
what it finds into the same rows and settles the run; here it is only started and watched. A run
whose process ended without having settled it, whatever ended it, is taken up again from its
checkpoint, as a new Flower run under the same id, :data:`ATTEMPTS` times in a row at most in which
no round is completed. Everything is looked up anew at each tick, so a hub that was killed in the
middle goes on where it was.
"""

import logging
import secrets
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, insert, select, update

from atoll.federation import release
from atoll.federation.errors import BadPlan, LinkError
from atoll.federation.plan import Plan, loads
from atoll.privacy.errors import BadParameters
from atoll.server import audit, claims, desired, plan_rules
from atoll.server.auth import Operator
from atoll.server.context import Clock, Nodes
from atoll.server.errors import BadInput, Conflict, Forbidden, NotFound
from atoll.server.schema import devices, rounds, runs, twins
from atoll.server.store import Store

log = logging.getLogger(__name__)

SERVER_APP: Final = "atoll.server.server_app:app"
RUN_KEY: Final = "run"
"""The key of ``run_config`` under which the ServerApp finds the run's id."""
ATTEMPT_KEY: Final = "attempt"
"""And the number of this start of it (:mod:`atoll.server.claims`)."""
ATTEMPTS: Final = 5
"""Starts in a row in which a run may complete no round, before it has failed."""
_HUB: Final = "hub"


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


def show(connection: Connection, run: str) -> dict[str, Any]:
    """Return a run with its plan and its rounds so far, JSON-able. Raises :class:`NotFound`."""
    columns = [column for column in runs.c if column.name != "record"]
    row = connection.execute(select(*columns).where(runs.c.id == run)).mappings().first()
    if row is None:
        raise _missing(run)
    done = connection.execute(select(rounds).where(rounds.c.run == run).order_by(rounds.c.round))
    return dict(row) | {"rounds": [dict(one) for one in done.mappings()]}


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
    plan_rules.check(plan)
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
    """Starts approved runs one after another, and takes up again those whose process has ended.

    ``folder`` holds a directory for each run, with its checkpoint.
    """

    def __init__(self, store: Store, nodes: Nodes, clock: Clock, folder: Path) -> None:
        self._store = store
        self._nodes = nodes
        self._clock = clock
        self._folder = folder

    def recover(self) -> None:
        """Take up the run that was being started when the hub went down, if there is one."""
        with self._store.read() as connection:
            running = connection.execute(_in_state("running")).mappings().all()
        for row in running:
            if row["flower_run"] is None:
                self._follow(row, "", "the hub ended while it was starting")

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
                .values(
                    state="running",
                    started_at=row["started_at"] or self._clock(),
                    reason=_resumed(row["stalled"]),
                    flower_run=None,
                    attempt=row["attempt"] + 1,
                )
            )
            if started.rowcount == 0:  # cancelled meanwhile
                return
        config = {RUN_KEY: row["id"], ATTEMPT_KEY: row["attempt"] + 1}
        try:
            flower = self._nodes.start_run(SERVER_APP, config)
        except LinkError as error:
            # Should it have taken effect all the same: either its process has come and has the
            # run, or it will find that the run was started anew and end.
            self._update(row["id"], {"state": "approved", "reason": str(error)})
            raise
        if not self._update(row["id"], {"flower_run": flower}):
            self._stop_unless_its_own(row["id"], flower)

    def _stop_unless_its_own(self, run: str, flower: str) -> None:
        """Stop what was started in vain: the run is cancelled, or has ended, meanwhile."""
        with self._store.read() as connection:
            row = _row(connection, run)
        if row["flower_run"] != flower or row["state"] == "cancelled":
            self._nodes.stop_run(flower)

    def _settle(self, row: RowMapping) -> bool:
        flower = row["flower_run"]
        if flower is None:
            return False
        # In this order: a process settles its run before it lets go of it.
        gone = claims.ended(self._folder / row["id"], row["attempt"])
        status = self._nodes.run_status(flower)
        if status.state == "finished":
            return self._follow(row, status.outcome, status.detail)
        if not gone:
            return False
        self._nodes.stop_run(flower)
        return self._follow(row, "", "it was killed")

    def _follow(self, before: RowMapping, outcome: str, detail: str) -> bool:
        """Move a run on whose process has ended, unless that has settled it."""
        now = self._clock()
        with self._store.begin() as connection:
            row = _row(connection, before["id"])
            if (row["state"], row["attempt"]) != ("running", before["attempt"]):
                return False
            values = after_end(outcome, detail, row["stalled"])
            again = values["state"] == "approved"
            ended = {} if again else {"ended_at": now}
            connection.execute(update(runs).where(runs.c.id == row["id"]).values(**values, **ended))
            action = "run.resume" if again else f"run.{values['state']}"
            audit.record(connection, _HUB, action, row["id"], now, reason=values["reason"])
        return True

    def _update(self, run: str, values: Mapping[str, Any]) -> bool:
        """Change a run that is being started, unless its process has come or it was cancelled."""
        starting = (runs.c.state == "running") & runs.c.flower_run.is_(None)
        with self._store.begin() as connection:
            changed = connection.execute(
                update(runs).where(runs.c.id == run, starting).values(**values)
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


def after_end(outcome: str, detail: str, stalled: int) -> dict[str, Any]:
    """Return what becomes of a run whose process ended without having settled it.

    ``outcome`` is Flower's, ``detail`` says why, and ``stalled`` how often that has happened
    since a round was completed. The values are those of the run's columns.
    """
    if outcome == "stopped":
        return {"state": "cancelled", "reason": "the run was stopped"}
    why = f" ({detail})" if detail else ""
    attempts = stalled + 1
    if attempts >= ATTEMPTS:
        return {
            "state": "failed",
            "reason": f"the run's process ended {attempts} times without having completed a "
            f"round{why}; see logs/executor.log in the hub's data directory",
        }
    return {
        "state": "approved",
        "stalled": attempts,
        "reason": f"the run's process ended{why}; it goes on from its checkpoint",
    }


def _resumed(stalled: int) -> str:
    """Say of a run that is started what came before; nothing for the first time."""
    if not stalled:
        return ""
    return f"taken up again from its checkpoint, attempt {stalled + 1} of {ATTEMPTS}"


def _in_state(state: str) -> Any:  # noqa: ANN401  a Select of all the columns
    """Return the runs in a state: those that have begun before those that have not, by age."""
    return (
        select(runs).where(runs.c.state == state).order_by(runs.c.attempt == 0, runs.c.created_at)
    )


def _row(connection: Connection, run: str) -> RowMapping:
    row = connection.execute(select(runs).where(runs.c.id == run)).mappings().first()
    if row is None:
        raise _missing(run)
    return row


def _missing(run: str) -> NotFound:
    return NotFound(f"there is no run {run!r}", "see the list of runs")


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
