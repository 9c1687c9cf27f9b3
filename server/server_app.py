"""The Flower ServerApp of every run, in a process that the SuperLink's executor starts.

``ATOLL_DATA`` and ``ATOLL_DATABASE`` say where the hub keeps things; the run's id comes with
Flower's run configuration. The plan, and who takes part, are read from the store; the pipeline
does the rest; here the run is settled: ``gated`` when its candidate waits to be signed,
``rejected`` when a gate failed, ``failed`` with the reason. When Flower no longer carries the
run, or this process is told to end, it is left as it is, for the hub to take up again.
"""

import logging
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
from atoll.federation.errors import FederationError, LinkError, RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.plan import Plan, loads
from atoll.federation.task import Task, find
from atoll.fleet.errors import FleetError
from atoll.privacy.errors import PrivacyError
from atoll.privacy.ledger import Ledger, LedgerStore
from atoll.privacy.modes import hub_session
from atoll.server import audit, eligibility, pipeline, record
from atoll.server.claims import Claim, ClaimedLedgerStore, Start, claimed
from atoll.server.errors import HubError, Superseded, Unavailable
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.recording import Recorder, SqlRecorder
from atoll.server.runs import ATTEMPT_KEY, RUN_KEY
from atoll.server.schema import devices, runs
from atoll.server.settings import Settings
from atoll.server.store import Store

ACTOR: Final = "run"
"""Who the audit log names for what a run's process does."""
_LOOK_SECONDS: Final = 0.5

MakeRecorder = Callable[[Store, str, Callable[[], float]], Recorder]
"""Makes a run's recorder from the store, the run's id and a clock of Unix seconds."""

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan that the hub started."""
    settings = Settings(
        data=Path(os.environ["ATOLL_DATA"]), database=os.environ.get("ATOLL_DATABASE") or None
    )
    store = Store(settings.database_url)
    start = Start(
        run=str(context.run_config[RUN_KEY]),
        attempt=int(context.run_config[ATTEMPT_KEY]),
        flower=str(context.run_id),
    )
    try:
        execute(BundledGrid(grid), store, settings, start)
    finally:
        store.close()


def execute(
    grid: Grid,
    store: Store,
    settings: Settings,
    start: Start,
    *,
    tasks: Callable[[str], Task] = find,
    now: Callable[[], float] = time.time,
    clock: Clock = SYSTEM_CLOCK,
    recorder: MakeRecorder = SqlRecorder,
) -> None:
    """Run a plan of the store, from its checkpoint if it has one, and settle the run.

    ``now`` gives Unix seconds; ``recorder`` makes who hears of the run. The grid is that of any
    engine: what a run does is decided by the plan and the store alone.

    What goes wrong in a way that a person can mend settles the run as failed and is not raised;
    anything else is both. :class:`LinkError` and :class:`Unavailable` are raised with the run as
    it was: it can go on in another process. One that finds the run to be another's ends without
    a word.
    """
    try:
        with claimed(store, settings.runs / start.run, start, clock) as claim:
            _carry_out(grid, store, settings, start, claim, tasks, now, clock, recorder)
    except Superseded as superseded:
        log.info("%s", superseded)


def _carry_out(
    grid: Grid,
    store: Store,
    settings: Settings,
    start: Start,
    claim: Claim,
    tasks: Callable[[str], Task],
    now: Callable[[], float],
    clock: Clock,
    recorder: MakeRecorder,
) -> None:
    run, folder = start.run, settings.runs / start.run
    try:
        with store.read() as connection:
            plan = _plan(connection, run)
        await_nodes(store, plan, clock)
        with store.read() as connection:
            cohort = cohort_of(connection, plan)
        await_cohort(grid, cohort, plan, clock)
        kept = ClaimedLedgerStore(SqlLedgerStore(store, now), claim)
        result = pipeline.run(
            pipeline.Job(
                *(grid, plan, cohort, tasks(plan.task), run, now()),
                clock=clock,
                attempt=start.attempt,
                left_out=lambda: eligibility.left_out(store, plan, now(), settings.offline_seconds),
            ),
            session=hub_session(plan.privacy.mode, cohort.roster),
            ledger=Ledger(kept, plan.model, plan.privacy.budget_epsilon, plan.privacy.delta),
            examples=_account_of_examples(kept, plan),
            recorder=recorder(store, run, now),
            out=settings.candidates / run,
            checkpoints=Checkpoints(folder),
        )
    except (LinkError, Unavailable, Superseded):
        raise
    except (FederationError, PrivacyError, FleetError, HubError, OSError) as error:
        _settle(store, folder, claim, "failed", str(error), now())
    except Exception as error:
        _settle(store, folder, claim, "failed", f"{type(error).__name__}: {error}", now())
        raise
    else:
        if result.manifest is None:
            _settle(store, folder, claim, "rejected", f"gates failed: {result.refused}", now())
        else:
            _settle(store, folder, claim, "gated", "", now())


def _account_of_examples(kept: LedgerStore, plan: Plan) -> Ledger | None:
    """Return the account of single examples, for a plan that protects them."""
    asked = plan.privacy.examples
    if asked is None:
        return None
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
        labels={row.id: row.labels for row in rows},
    )


def await_nodes(store: Store, plan: Plan, clock: Clock) -> None:
    """Wait until every enrolled device is known to the SuperLink, at most for the round's timeout.

    One that came back knows none until the hub has told it; a cohort taken meanwhile would be
    another than that which the run began with.
    """
    unknown = select(devices.c.id).where(
        devices.c.revoked_at.is_(None), devices.c.node_id.is_(None)
    )
    deadline = clock.now() + plan.cohort.round_timeout
    while clock.now() < deadline:
        with store.read() as connection:
            if connection.execute(unknown).first() is None:
                return
        clock.pause(_LOOK_SECONDS)


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
    store: Store,
    folder: Path,
    claim: Claim,
    state: Literal["gated", "rejected", "failed"],
    reason: str,
    now: float,
) -> None:
    """Write how a run ended, unless it was cancelled or taken up by another process meanwhile.

    ``folder`` is the run's, and has its name; its record goes there, and the record's digest into
    the audit log.
    """
    run = folder.name
    with store.begin() as connection:
        changed = connection.execute(
            update(runs).where(claim.mine).values(state=state, reason=reason, ended_at=now)
        )
        if changed.rowcount:
            digest = record.settle(connection, folder, run)
            audit.record(connection, ACTOR, f"run.{state}", run, now, reason=reason, record=digest)
