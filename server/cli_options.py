"""What the modules of the command line share: options, and how errors end a command."""

import errno
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Final, ParamSpec, TypeVar

import typer

from atoll.server.client import Failure, HubClient, Misuse, find_access
from atoll.server.errors import BadInput, HubError
from atoll.server.tables import clean, note

INTERRUPTED: Final = 130

Data = Annotated[
    Path | None,
    typer.Option(
        help="The hub's data directory. (default: $ATOLL_DATA or ~/.local/share/atoll/hub)",
        show_default=False,
    ),
]
MlflowUrl = Annotated[
    str | None,
    typer.Option(
        envvar="ATOLL_MLFLOW",
        show_envvar=False,
        help="URL of the MLflow tracking server to tell of runs. (default: $ATOLL_MLFLOW, or none)",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def guarded(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make a command end with a sentence and an exit status where it would raise.

    Its docstring becomes its help, in paragraphs that fit whatever width the terminal has.
    """

    @wraps(command)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()  # so that a disk that is full is found here
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
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read us has left; typer ends quietly
                raise
            status = 1
            message = f"{error.strerror or error}: {error.filename or 'standard output'}"
        else:
            return result
        note(f"error: {clean(message)}")
        raise typer.Exit(status)

    run.__doc__ = flowing(command.__doc__ or "")
    return run


def flowing(text: str) -> str:
    """Return text with a line for each paragraph; a paragraph of ``- `` items is left as it is."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith("- ") else " ".join(paragraph.split())
        for paragraph in paragraphs
    )


def tracking(url: str) -> str:
    """Return the URL of a tracking server; raise :class:`Misuse` for what is none."""
    from atoll.server.mlflow import target

    try:
        target(url)
    except BadInput as error:
        raise Misuse(f"--mlflow: {error}") from error
    return url


def agreed(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone; raise :class:`Failure` unless agreed.

    Only a person at a terminal, who sees the question, is asked.
    """
    if (
        not yes
        and sys.stdin.isatty()
        and sys.stderr.isatty()
        and not typer.confirm(question, err=True)
    ):
        raise Failure("nothing was done")


def connect(data: Path | None) -> HubClient:
    """Return a client of the hub that ``--data`` or the environment names."""
    return HubClient(find_access(data))
