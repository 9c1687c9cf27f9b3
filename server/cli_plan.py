"""``atoll plan``: federated runs, from a plan file to a candidate model."""

import time
from pathlib import Path
from typing import Annotated

import typer

from atoll.federation import plan as plans
from atoll.federation.errors import BadPlan
from atoll.server import plan_rules
from atoll.server.cli_cohorts import put_cohorts
from atoll.server.cli_options import Data, Json, connect, guarded
from atoll.server.cli_progress import RunProgress, follow, outcome
from atoll.server.client import Failure, HubClient, Misuse, NotAllowed
from atoll.server.errors import BadInput
from atoll.server.tables import ago, note, put, put_facts, put_json, put_table, span

app = typer.Typer(help="Train: run a plan, look at runs, approve them.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(help="The run's id.", metavar="RUN")]


@app.command("run")
@guarded
def run_plan(
    file: Annotated[Path, typer.Argument(help="The plan, a TOML file.", metavar="FILE")],
    *,
    watch: Annotated[
        bool, typer.Option("--watch/--detach", help="Stay until the run ends, or return at once.")
    ] = True,
    reason: Annotated[str, typer.Option(help="Goes into the audit log.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Propose a plan, approve it if your role may, and watch the run.

    Ends with status 0 when the run leaves a candidate that passed its gates, and with 1 when it
    failed or a gate refused it. Interrupting stops the watching, not the run.
    """
    text = _read(file)
    client = connect(data)
    made = client.post("runs", body={"plan": text, "reason": reason})
    run = made["id"]
    approved = _approve_own(client, run)
    if not (watch and approved):
        if as_json:
            put_json(client.get("runs", run))
        else:
            put(run)
        if approved:
            note(f"Follow it with: atoll plan show {run} --watch")
        return
    _watch(client, run, as_json=as_json)


@app.command("list")
@guarded
def list_runs(*, data: Data = None, as_json: Json = False) -> None:
    """List the runs, newest first."""
    found = connect(data).get("runs")
    if as_json:
        put_json(found)
        return
    now = time.time()
    put_table(
        ["Run", "Plan", "Model", "State", "Stage", "Began", "Took", "Why"],
        [
            [
                run["id"],
                run["name"],
                run["model"],
                run["state"],
                run["stage"] if run["state"] == "running" else "",
                ago(run["started_at"] or run["created_at"], now),
                span(run["ended_at"] - run["started_at"])
                if run["ended_at"] and run["started_at"]
                else "",
                run["reason"],
            ]
            for run in found
        ],
        "No plan has run yet; `atoll plan run FILE` runs one.",
    )


@app.command("show")
@guarded
def show_run(
    run: RunId,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until the run ends.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show a run and its rounds."""
    client = connect(data)
    if watch:
        _watch(client, run, as_json=as_json)
        return
    found = client.get("runs", run)
    if as_json:
        put_json(found)
        return
    put_facts(
        {
            "run": found["id"],
            "plan": found["name"],
            "model": found["model"],
            "state": found["state"],
            "stage": found["stage"],
            "why": found["reason"],
            "proposed by": found["created_by"],
            "approved by": found["approved_by"],
        }
        | outcome(found)
    )
    put_table(
        ["Round", "Seconds", "Answered", "Dropped", "Loss", "ε"],
        [
            [
                done["round"],
                f"{done['seconds']:.1f}",
                len(done["survivors"]),
                len(done["dropped"]),
                "–" if done["loss"] is None else f"{done['loss']:.4f}",
                "–" if done["epsilon"] is None else f"{done['epsilon']:.3g}",
            ]
            for done in found["rounds"]
        ],
        "No round is done yet.",
    )
    put_cohorts(found["metrics"] or {})


@app.command("approve")
@guarded
def approve_run(run: RunId, *, data: Data = None, as_json: Json = False) -> None:
    """Let a proposed run start."""
    done = connect(data).post("runs", run, "approve")
    if as_json:
        put_json(done)
    else:
        put(f"Run {run} is approved.")


@app.command("cancel")
@guarded
def cancel_run(run: RunId, *, data: Data = None, as_json: Json = False) -> None:
    """End a run; what it has spent of the privacy budget stays spent."""
    done = connect(data).post("runs", run, "cancel")
    if as_json:
        put_json(done)
    else:
        put(f"Run {run} is cancelled.")


def _read(file: Path) -> str:
    """Return a plan's text after checking it, so that a slip is told before any network."""
    try:
        plan_rules.check(plans.load(file))
        return file.read_text(encoding="utf-8")
    except (BadPlan, BadInput) as error:
        raise Misuse(str(error)) from error


def _approve_own(client: HubClient, run: str) -> bool:
    try:
        client.post("runs", run, "approve")
    except NotAllowed as refusal:
        note(f"Run {run} waits for an approver ({refusal}): atoll plan approve {run}")
        return False
    return True


def _watch(client: HubClient, run: str, *, as_json: bool) -> None:
    try:
        with RunProgress() as progress:
            ended = follow(lambda: client.get("runs", run), progress.show)
    except KeyboardInterrupt:
        note(f"\nRun {run} goes on. Follow it with: atoll plan show {run} --watch")
        raise
    if as_json:
        put_json(ended)
    else:
        put_facts({"run": run, "state": ended["state"], "why": ended["reason"]} | outcome(ended))
        put_cohorts(ended["metrics"] or {})
    if ended["state"] not in ("gated", "published"):
        raise Failure(f"run {run} is {ended['state']}: {ended['reason'] or 'no reason is given'}")
    if ended["state"] == "gated":
        note(f"Its candidate waits to be signed: atoll model publish {run}")
