"""``atoll-agent``: enrol, run, status, outbox."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from atoll.edge_agent import slots
from atoll.edge_agent.control import STATUS_KEY, Status
from atoll.edge_agent.credentials import load as load_credentials
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.paths import Paths, default_data, running
from atoll.fleet.errors import FleetError

# Typer joins single lines of an epilog and keeps paragraphs: one row of the table each.
_STATUSES = (
    "| Exit status | meaning |",
    "|---|---|",
    "| 0 | done |",
    "| 1 | a problem, told in one sentence |",
    "| 2 | wrong usage |",
)
EPILOG = "\n\n".join(_STATUSES)

app = typer.Typer(
    name="atoll-agent",
    help="The Atoll agent: serves, watches and trains on this device.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Data directory. Else $ATOLL_AGENT_DATA, /var/lib/atoll-agent as root, or "
        "~/.local/share/atoll/agent.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _paths(data: Path | None) -> Paths:
    chosen = data or default_data(os.environ, root=os.geteuid() == 0)
    return Paths(chosen.absolute())


@app.command(epilog=EPILOG)
def enrol(
    token: Annotated[str, typer.Option(help="One-time token from `atoll device token`.")],
    data: Data = None,
    device: Annotated[
        str | None, typer.Option(help="This device's id, where the token leaves it open.")
    ] = None,
    json: Json = False,  # noqa: FBT002  # typer options are keyword arguments with defaults
) -> None:
    """Join a hub's fleet with a one-time token."""
    from atoll.edge_agent.enrol import enrol as enrol_device

    facts = enrol_device(token, _paths(data), device, datetime.now(UTC))
    if json:
        typer.echo(msgspec.json.encode({"device": facts.device, "hub": facts.url}))
    else:
        start = "atoll-agent run" + (f" --data {data}" if data else "")
        typer.echo(f"enrolled as {facts.device} at {facts.url}; start it with `{start}`")


@app.command(epilog=EPILOG)
def run(
    data: Data = None,
    serve_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1 to serve on; 0: any free.")
    ] = 0,
    window_rows: Annotated[
        int, typer.Option(min=1, help="Report counts after this many served examples …")
    ] = 256,
    window_seconds: Annotated[
        float, typer.Option(min=0.1, help="… or after this many seconds.")
    ] = 60.0,
    health_seconds: Annotated[
        float, typer.Option(min=0.5, help="Seconds between health reports.")
    ] = 30.0,
    task: Annotated[
        str | None,
        typer.Option(help="Installed task to train; else the first that finds its data."),
    ] = None,
    allow_plain: Annotated[  # noqa: FBT002  # typer options are keyword arguments with defaults
        bool, typer.Option("--allow-plain", help="Let plans sum updates that the hub can read.")
    ] = False,
    least_noise: Annotated[
        float,
        typer.Option(
            min=0.0, help="Train only where devices add noise of at least this multiplier."
        ),
    ] = 0.0,
    least_devices: Annotated[
        int, typer.Option(min=1, help="Train only where at least so many devices are summed.")
    ] = 1,
) -> None:
    """Run the agent until it is stopped (Ctrl-C or SIGTERM)."""
    paths = _paths(data)
    load_credentials(paths)
    # Become the control process: what always runs should not carry this command line's parts.
    sys.stdout.flush()
    os.execv(  # noqa: S606  # our own interpreter, no shell
        sys.executable,
        [
            *(sys.executable, "-m", "atoll.edge_agent.control"),
            *("--data", str(paths.data), "--serve-port", str(serve_port)),
            *("--window-rows", str(window_rows), "--window-seconds", str(window_seconds)),
            *("--health-seconds", str(health_seconds)),
            *(() if task is None else ("--task", task)),
            *(("--allow-plain",) if allow_plain else ()),
            *("--least-noise", str(least_noise), "--least-devices", str(least_devices)),
        ],
    )


@app.command(epilog=EPILOG)
def status(
    data: Data = None,
    json: Json = False,  # noqa: FBT002  # typer options are keyword arguments with defaults
) -> None:
    """Show what runs on this device."""
    facts = _status(_paths(data))
    if json:
        typer.echo(msgspec.json.encode(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = "–" if value is None else value
        typer.echo(f"{name.replace('_', ' '):<{width}}  {shown}")


@app.command(epilog=EPILOG)
def outbox(
    data: Data = None,
    limit: Annotated[int, typer.Option(min=1, help="Show no more than this many.")] = 50,
    json: Json = False,  # noqa: FBT002  # typer options are keyword arguments with defaults
) -> None:
    """Show what waits to be sent to the hub, in the order of sending."""
    from atoll.edge_agent.waiting import waiting

    paths = _paths(data)
    load_credentials(paths)
    rows = list(waiting(paths.database, limit)) if paths.database.exists() else []
    if json:
        typer.echo(msgspec.json.encode(rows))
        return
    if not rows:
        typer.echo("Nothing waits: the hub has acknowledged everything.")
    for row in rows:
        when = datetime.fromtimestamp(row.at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        typer.echo(f"{row.boot:>4}/{row.seq:<6} {when}  {row.kind:<10} {row.bytes:>7,} bytes")


def _status(paths: Paths) -> dict[str, object]:
    who = load_credentials(paths)
    alive = running(paths)
    known = Status()
    serving = None
    counts = None
    if paths.database.exists():
        database = Database(paths.database)
        known = database.get(STATUS_KEY, Status) or known
        serving = slots.installed(database)
        counts = Outbox(database).counts()
        database.close()
    reported = known.reported
    return {
        "device": who.hub.device,
        "hub": who.hub.url,
        "running": alive,
        "connected": alive and known.linked,
        "model": serving.model if serving else None,
        "release": serving.release if serving else None,
        "state": reported.state if reported and alive else "stopped",
        "serve_url": known.serve_url if alive else None,
        "outbox_waiting": counts.waiting if counts else 0,
        "outbox_bytes": counts.bytes if counts else 0,
        "outbox_dropped": counts.dropped if counts else 0,
        "last_error": (known.link_error if alive else None) or known.last_error,
    }


def main() -> None:
    """Run the command line; problems become one sentence and exit status 1."""
    try:
        app()
    except (AgentError, FleetError) as error:
        typer.echo(f"atoll-agent: {error}", err=True)
        sys.exit(1)
