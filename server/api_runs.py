"""Operator routes about runs, what they left to be signed, and what privacy they cost."""

import math
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from sqlalchemy import select

from atoll.federation.errors import LinkError
from atoll.server import record, runs
from atoll.server.accounts import accounts
from atoll.server.answers import inside
from atoll.server.api_access import Approver, Hub, Operating, Viewer
from atoll.server.errors import Unavailable
from atoll.server.schema import runs as runs_table

router: Final = APIRouter()


class RunRequest(BaseModel, extra="forbid"):
    """A plan to run."""

    plan: Annotated[str, Field(max_length=64 * 1024)]
    """TOML."""
    reason: Annotated[str, Field(max_length=500)] = ""


@router.post("/runs", tags=["runs"], status_code=201)
def propose_run(body: RunRequest, hub: Hub, who: Operating) -> dict[str, str]:
    """Propose a run; it waits until an approver lets it start."""
    with hub.store.begin() as connection:
        run = runs.propose(
            connection, body.plan, actor=who.name, now=hub.clock(), reason=body.reason
        )
    hub.bus.publish("runs", "audit")
    return {"id": run, "state": "proposed"}


@router.get("/runs", tags=["runs"])
def list_runs(hub: Hub, _who: Viewer) -> list[dict[str, Any]]:
    """List the runs, newest first."""
    columns = [column for column in runs_table.c if column.name not in ("plan", "record")]
    with hub.store.read() as connection:
        rows = connection.execute(select(*columns).order_by(runs_table.c.created_at.desc()))
        return [dict(row) for row in rows.mappings()]


@router.get("/runs/{run}", tags=["runs"])
def show_run(run: str, hub: Hub, _who: Viewer) -> dict[str, Any]:
    """Show a run with its plan and its rounds so far."""
    with hub.store.read() as connection:
        return runs.show(connection, run)


@router.get("/runs/{run}/record", tags=["runs"])
def show_record(run: str, hub: Hub, _who: Viewer) -> Response:
    """Return a run's record; of one that is settled the bytes whose digest the audit log has."""
    with hub.store.read() as connection:
        data = record.read(connection, hub.settings.runs / run, run)
    return Response(data, media_type="application/json")


@router.post("/runs/{run}/approve", tags=["runs"])
def approve_run(run: str, hub: Hub, who: Approver) -> dict[str, str]:
    """Let a proposed run start. Nobody approves a run of their own, an admin aside."""
    with hub.store.begin() as connection:
        runs.approve(connection, run, operator=who, now=hub.clock())
    hub.bus.publish("runs", "audit")
    return {"id": run, "state": "approved"}


@router.post("/runs/{run}/cancel", tags=["runs"])
def cancel_run(run: str, hub: Hub, who: Operating) -> dict[str, str]:
    """End a run that has not ended; what it has spent of the budget stays spent."""
    with hub.store.begin() as connection:
        flower = runs.cancel(connection, run, actor=who.name, now=hub.clock())
    hub.bus.publish("runs", "audit")
    if flower is not None:
        try:
            hub.nodes.stop_run(flower)
        except LinkError as error:
            raise Unavailable(
                f"the run is cancelled, but its process may still work: {error}",
                "restart the hub to be sure",
            ) from error
    return {"id": run, "state": "cancelled"}


@router.get("/candidates/{run}/{file}", tags=["models"])
def candidate_file(run: str, file: str, hub: Hub, _who: Operating) -> FileResponse:
    """Return a file of the bundle that a run left to be signed."""
    path = inside(hub.settings.candidates, f"{run}/{file}")
    return FileResponse(path, media_type="application/octet-stream")


@router.get("/ledger", tags=["privacy"])
def show_ledger(
    hub: Hub, _who: Viewer, delta: Annotated[float | None, Query(gt=0, lt=1)] = None
) -> list[dict[str, Any]]:
    """Show what each population has spent for each unit of privacy; no ε means: not bounded.

    Each account is judged at its own δ, that of the plan charged last, or all at ``delta``. A
    limit is shown at the δ that it is for. The curve gives ε after so many charges.
    """
    with hub.store.read() as connection:
        found = accounts(connection, delta)
    return [
        {
            "population": account.population,
            "unit": account.unit,
            "charges": len(account.charges),
            "epsilon": _bounded(account.spent.epsilon_pld),
            "epsilon_rdp": _bounded(account.spent.epsilon_rdp),
            "delta": account.spent.delta,
            "method": account.spent.method,
            "relation": account.spent.relation,
            "budget": account.terms.budget_epsilon,
            "curve": [[charges, _bounded(epsilon)] for charges, epsilon in account.curve.items()],
        }
        for account in found
    ]


def _bounded(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
