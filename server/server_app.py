"""The Flower ServerApp of every run, in a process that the SuperLink's executor starts.

``ATOLL_DATA`` and ``ATOLL_DATABASE`` say where the hub keeps things; the run's id comes with
Flower's run configuration. The plan, and who takes part, are read from the store; the pipeline
does the rest; here the run is settled: ``gated`` when its candidate waits to be signed,
``rejected`` when a gate failed, ``failed`` with the reason.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from sqlalchemy import Connection, select, update

from atoll.federation.bundled_grid import BundledGrid
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort, Member
from atoll.federation.errors import FederationError, RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.plan import Plan, loads
from atoll.federation.task import Task, find
from atoll.fleet.errors import FleetError
from atoll.privacy.errors import PrivacyError
from atoll.privacy.ledger import Ledger
from atoll.privacy.modes import hub_session
from atoll.server import audit, pipeline
from atoll.server.errors import HubError
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.recording import SqlRecorder
from atoll.server.runs import RUN_KEY
from atoll.server.schema import devices, runs
from atoll.server.settings import Settings
from atoll.server.store import Store

ACTOR: Final = "run"
"""Who the audit log names for what a run's process does."""
_LOOK_SECONDS: Final = 0.5

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan that the hub started."""
    settings = Settings(
        data=Path(os.environ["ATOLL_DATA"]), database=os.environ.get("ATOLL_DATABASE") or None
    )
    store = Store(settings.database_url)
    try:
        execute(BundledGrid(grid), store, settings, str(context.run_config[RUN_KEY]))
    finally:
        store.close()


def execute(
    grid: Grid,
    store: Store,
    settings: Settings,
    run: str,
    *,
    tasks: Callable[[str], Task] = find,
    now: Callable[[], float] = time.time,
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """Run a plan of the store and settle the run; ``now`` gives Unix seconds.

    What goes wrong in a way that a person can mend settles the run as failed and is not
    raised; anything else is both.
    """
    try:
        with store.read() as connection:
            plan = _plan(connection, run)
            cohort = cohort_of(connection, plan)
        await_cohort(grid, cohort, plan, clock)
        result = pipeline.run(
            pipeline.Job(grid, plan, cohort, tasks(plan.task), run, now(), clock=clock),
            session=hub_session(plan.privacy.mode, cohort.roster),
            ledger=Ledger(
                SqlLedgerStore(store, now),
                plan.model,
                plan.privacy.budget_epsilon,
                plan.privacy.delta,
            ),
            examples=_account_of_examples(store, plan, now),
            recorder=SqlRecorder(store, run, now),
            out=settings.candidates / run,
            checkpoints=Checkpoints(settings.data / "runs" / run),
        )
    except (FederationError, PrivacyError, FleetError, HubError, OSError) as error:
        _settle(store, run, "failed", str(error), now())
    except BaseException as error:
        _settle(store, run, "failed", f"{type(error).__name__}: {error}", now())
        raise
    else:
        if result.manifest is None:
            _settle(store, run, "rejected", f"gates failed: {result.refused}", now())
        else:
            _settle(store, run, "gated", "", now())


def _account_of_examples(store: Store, plan: Plan, now: Callable[[], float]) -> Ledger | None:
    """Return the account of single examples, for a plan that protects them."""
    asked = plan.privacy.examples
    if asked is None:
        return None
    kept = SqlLedgerStore(store, now)
    return Ledger(kept, plan.model, asked.budget_epsilon, asked.delta, unit="example")


def cohort_of(connection: Connection, plan: Plan) -> Cohort:
    """Return the fleet as a cohort: who carries the plan's labels trains, all evaluate.

    Raises :class:`RoundFailed` when the plan can never have enough devices.
    """
    query = (
        select(devices.c.id, devices.c.labels, devices.c.certificate, devices.c.node_id)
        .where(devices.c.revoked_at.is_(None), devices.c.node_id.is_not(None))
        .order_by(devices.c.id)
    )
    rows = connection.execute(query).all()
    wanted = plan.cohort.labels.items()
    trainers = [row.id for row in rows if wanted <= row.labels.items()]
    if len(trainers) < plan.cohort.min_devices:
        labels = ", ".join(f"{name}={value}" for name, value in wanted) or "any"
        raise RoundFailed(
            f"{len(trainers)} enrolled devices carry the plan's labels ({labels}) and it needs "
            f"{plan.cohort.min_devices}; enrol more, or lower cohort.min_devices"
        )
    return Cohort(
        members={row.id: Member(int(row.node_id), row.certificate.encode()) for row in rows},
        trainers=trainers,
        evaluators=[row.id for row in rows],
    )


def await_cohort(grid: Grid, cohort: Cohort, plan: Plan, clock: Clock) -> None:
    """Wait until every device of the cohort is connected, at most for the round's timeout.

    Whoever is missing then is left out by what comes after, which decides if enough are there.
    """
    deadline = clock.now() + plan.cohort.round_timeout
    wanted = set(cohort.nodes.values())
    while not wanted <= set(grid.get_node_ids()) and clock.now() < deadline:
        clock.pause(_LOOK_SECONDS)


def _plan(connection: Connection, run: str) -> Plan:
    text: str = connection.execute(select(runs.c.plan).where(runs.c.id == run)).scalar_one()
    return loads(text)


def _settle(
    store: Store, run: str, state: Literal["gated", "rejected", "failed"], reason: str, now: float
) -> None:
    """Write how a run ended, unless it was cancelled meanwhile."""
    with store.begin() as connection:
        changed = connection.execute(
            update(runs)
            .where(runs.c.id == run, runs.c.state == "running")
            .values(state=state, reason=reason, ended_at=now)
        )
        if changed.rowcount:
            audit.record(connection, ACTOR, f"run.{state}", run, now, reason=reason)
