"""What the modules of the command line share: options, and how errors end a command."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Final, ParamSpec, TypeVar

import typer
from atoll.server.client import Failure, HubClient, find_access
from atoll.server.errors import HubError
from atoll.server.tables import clean, note

INTERRUPTED: Final = 130

Data = Annotated[
    Path | None,
    typer.Option(
        help="The hub's data directory. (default: $ATOLL_DATA or ~/.local/share/atoll/hub)",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def guarded(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make a command end with a sentence and an exit status where it would raise."""

    @wraps(command)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except Failure as failure:
            status, message = failure.exit_status, str(failure)
        except HubError as error:
            status, message = 1, str(error)
        except KeyboardInterrupt:
            status, message = INTERRUPTED, "interrupted"
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("atoll"):
                raise
            status = 1
            message = (
                f"this needs the package {error.name}, which is not installed; install Atoll "
                "with: pip install 'atoll[hub]'"
            )
        sys.stdout.flush()
        note(f"error: {clean(message)}")
        raise typer.Exit(status)

    return run


def connect(data: Path | None) -> HubClient:
    """Return a client of the hub that ``--data`` or the environment names."""
    return HubClient(find_access(data))
