"""``atoll keys``: the keys that sign models, which the hub should not hold."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from atoll.server.cli_options import Data, Json, guarded
from atoll.server.client import Failure, default_data
from atoll.server.tables import note, put, put_json

app = typer.Typer(help="Make the keys that sign models.", no_args_is_help=True)

Keys = Annotated[
    Path, typer.Option(help="Where the offline keys go: a medium that you take away afterwards.")
]


# A group of one command would lose the command's name.
@app.callback()
def keys() -> None:
    """Make the keys that sign models."""


@app.command("init")
@guarded
def init(*, keys: Keys, data: Data = None, as_json: Json = False) -> None:
    """Make the keys and an empty repository for a hub that has not run yet.

    The two offline keys, root and targets, go to --keys and nowhere else; the two online keys
    and the repository go into the hub's data directory. Run it on the hub's machine before the
    first `atoll hub`, which would else make the offline keys itself, in its own data directory.
    """
    from atoll.server.repository import init_repository
    from atoll.server.settings import Settings
    from atoll.server.tuf_metadata import OFFLINE, create_keys, key_file

    settings = Settings(data=(data or default_data()).absolute())
    if (settings.tuf / "metadata" / "1.root.json").exists():
        raise Failure(
            f"{settings.tuf} holds a repository already, and its devices trust the keys that "
            "made it: nothing was done"
        )
    try:
        create_keys(keys, settings.online_keys)
        init_repository(settings.tuf, keys, settings.online_keys, datetime.now(UTC))
    except OSError as error:
        raise Failure(f"cannot write {error.filename or keys}: {error.strerror}") from error
    offline = [key_file(keys, name) for name in OFFLINE]
    if as_json:
        put_json({"offline": [str(path) for path in offline], "repository": str(settings.tuf)})
        return
    for path in offline:
        put(str(path))
    note(
        "Take these away from this machine, and keep a copy: without them no model can be "
        "published any more. Sign with: atoll model publish RUN --keys DIR"
    )
