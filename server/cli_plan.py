"""``atoll plan``: federated runs, from a plan file to a candidate model."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from atoll.federation import plan as plans
from atoll.federation.errors import BadPlan
from atoll.server import cli_local
from atoll.server.cli_cohorts import put_cohorts
from atoll.server.cli_options import Data, Json, MlflowUrl, connect, guarded, tracking
from atoll.server.cli_progress import RunProgress, follow, outcome, put_rounds, standing_of
from atoll.server.client import Failure, HubClient, Misuse, NotAllowed
from atoll.server.errors import BadInput
from atoll.server.tables import ago, note, put, put_bytes, put_facts, put_json, put_table, span

app = typer.Typer(help="Train: run a plan, look at runs, approve them.", no_args_is_help=True)

Engine = Literal["fleet", "local", "ray"]
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
    engine: Annotated[
        Engine,
        typer.Option(
            help="What runs it: the hub's fleet; or, without a hub, this process, or Ray on the "
            "cores of one machine or several."
        ),
    ] = "fleet",
    devices: Annotated[
        int | None,
        typer.Option(
            help="local, ray: deal examples of the plan's task out to so many devices.",
            show_default=False,
            min=1,
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="local, ray: a directory with a folder for each device, which holds its examples "
            "as the task reads them and, where it has labels, labels.toml.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="local, ray: the run's directory, with its candidate in the end; a run that was "
            "interrupted in it goes on. (default: a new one in runs/)",
            show_default=False,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="ray: a cluster's address, or auto. (default: a Ray of our own, on this machine)",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Propose a plan, approve it if your role may, and watch the run; or run it here.

    Ends with status 0 when the run leaves a candidate that passed its gates, and with 1 when it
    failed or a gate refused it. Interrupting stops the watching of a fleet's run, not the run.
    One with --engine local or ray ends with the command, and goes on where it was with --out.
    """
    wanted = cli_local.Wanted(engine, devices, examples, ray_address, out)
    of_fleet = {"--data": data, "--detach": not watch, "--reason": reason}
    cli_local.check(wanted, [name for name, given in of_fleet.items() if given])
    text = _read(file)
    if engine != "fleet":
        cli_local.run_here(text, wanted, as_json=as_json)
        return
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
            "rounds": str(standing_of(found)),
            "why": found["reason"],
            "proposed by": found["created_by"],
            "approved by": found["approved_by"],
        }
        | outcome(found)
    )
    put_rounds(found)
    put_cohorts(found["metrics"] or {})


@app.command("record")
@guarded
def show_record(run: RunId, *, data: Data = None) -> None:
    """Print a run's record: plan, versions, seed, metrics, charges, digests, as JSON.

    Of a run that has ended these are the bytes whose SHA-256 the audit log names.
    """
    put_bytes(connect(data).fetch("runs", run, "record"))


@app.command("export")
@guarded
def export_run(run: RunId, *, mlflow: MlflowUrl = None, data: Data = None) -> None:
    """Tell an MLflow tracking server of a run; what it has been told already it is not told again.

    A hub that was started with --mlflow does so by itself.
    """
    if mlflow is None:
        raise Misuse("name the tracking server with --mlflow, or in $ATOLL_MLFLOW")
    from atoll.server.exporting import export
    from atoll.server.mlflow import Mlflow

    with Mlflow(tracking(mlflow)) as server:
        put(export(server, connect(data).fetch("runs", run, "record")))
        note(f"Run {run} is at {server.target}.")


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
    # Imported here: help and completion do without what judges rules.
    from atoll.server import plan_rules

    try:
        plan_rules.check(plans.load(file))
        return plans.read(file)
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
