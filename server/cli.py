"""``atoll``: the hub and its operators' commands.

Each group of commands has a module of its own (``cli_hub``, ``cli_device``, …). What takes
long to import is imported by the command that needs it, so ``--help`` and completion are fast.
"""

import importlib
from importlib.metadata import version
from typing import Annotated, Any, Final

import typer

from atoll.server import (
    cli_device,
    cli_hub,
    cli_keys,
    cli_model,
    cli_plan,
    cli_privacy,
    cli_simulate,
)
from atoll.server.cli_options import Data, Json, connect, flowing, guarded
from atoll.server.tables import put, put_json

HELP: Final = """\
Train, ship, serve and watch models on devices whose data never leaves them.

`atoll hub` starts a hub. The other commands talk to it: to the one whose data directory --data
names (default: $ATOLL_DATA or ~/.local/share/atoll/hub), or to the one at $ATOLL_URL, let in
by $ATOLL_TOKEN.

Exit status:

- 0: done
- 1: failed, or refused for the reason given
- 2: wrong usage, or a file that cannot be used
- 3: no hub could be reached
- 4: not allowed
- 130: interrupted
"""

app = typer.Typer(help=flowing(HELP), no_args_is_help=True, pretty_exceptions_enable=False)
app.command("hub")(guarded(cli_hub.hub))
app.add_typer(cli_device.app, name="device")
app.add_typer(cli_plan.app, name="plan")
app.add_typer(cli_model.app, name="model")
app.add_typer(cli_privacy.app, name="privacy")
app.add_typer(cli_keys.app, name="keys")


@app.command()
@guarded
def login(*, data: Data = None, as_json: Json = False) -> None:
    """Print a link that lets you into the dashboard, once and soon."""
    made = connect(data).post("login-link")
    if as_json:
        put_json(made)
    else:
        put(made["url"])


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@guarded
def demo(context: typer.Context) -> None:
    """Run the whole loop on real recordings, with ten devices on this machine."""
    # By name: the hub's package knows nothing of the simulations that stand on it.
    simulation: Any = importlib.import_module("atoll.simulations.demo")
    simulation.command(context.args)


app.command("simulate")(guarded(cli_simulate.simulate))


@guarded
def _version(wanted: bool) -> None:  # noqa: FBT001 -- typer's calling convention
    if wanted:
        put(f"atoll {version('atoll')}")
        raise typer.Exit


@app.callback()
def root(
    *,
    show: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Take the options that come before a command."""


def main() -> None:
    """Run the command line."""
    app(prog_name="atoll")
