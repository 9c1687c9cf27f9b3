"""``atoll model publish``: look at what a run has made, sign it, hand the signature to the hub."""

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from atoll.server.cli_options import Data, Json, Yes, agreed, connect, guarded
from atoll.server.client import Failure, HubClient, Misuse, default_data
from atoll.server.tables import clean, note, put, put_json


@guarded
def publish(
    run: Annotated[str, typer.Argument(help="The run whose candidate it is.", metavar="RUN")],
    *,
    keys: Annotated[
        Path | None,
        typer.Option(help="Directory with the offline keys. (default: offline-keys in --data)"),
    ] = None,
    yes: Yes = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Sign a run's candidate with the offline key and publish it as the next release.

    The candidate is fetched from the hub and checked here; the key never leaves this machine.
    The release before it, if there is one, becomes its fallback. Asks first when it is typed at
    a terminal.
    """
    from atoll.server.errors import BadInput
    from atoll.server.signing import next_release, sign_release
    from atoll.server.tuf_metadata import signer

    offline = keys or (data or default_data()) / "offline-keys"
    try:
        signer(offline, "targets")
    except BadInput as error:
        raise Misuse(f"{error}: --keys") from error
    client = connect(data)
    found = client.get("runs", run)
    if found["state"] != "gated":
        why = f": {found['reason']}" if found["reason"] else ""
        raise Failure(f"run {run} is {found['state']} and has no candidate to sign{why}")
    model = found["model"]
    with TemporaryDirectory(prefix="atoll-") as directory:
        bundle = Path(directory)
        card = _fetch(client, run, bundle)
        current = client.fetch("targets")
        following = next_release(current, model)
        note(clean_lines(card))
        agreed(f"Sign this as {model} release {following.release}?", yes=yes)
        signed = sign_release(
            current,
            bundle,
            offline,
            model=model,
            release=following.release,
            fallback=following.fallback,
            now=datetime.now(UTC),
        )
    body = {"run": run, "targets": signed.decode()}
    made: dict[str, Any] = client.post("models", model, "releases", body=body)
    if as_json:
        put_json(made)
        return
    put(f"{model} release {made['release']} is published.")
    note(f"Bring it to the devices with: atoll model roll-out {model}")


def clean_lines(text: str) -> str:
    """Return text of several lines in which nothing steers the terminal."""
    return "\n".join(clean(line) for line in text.splitlines())


def _fetch(client: HubClient, run: str, bundle: Path) -> str:
    """Fetch a run's candidate into ``bundle``, check it whole, and return its model card."""
    from atoll.fleet import bundle as bundles
    from atoll.fleet.errors import BadBundle

    for name in bundles.FILES:
        client.download("candidates", run, name, to=bundle / name)
    try:
        bundles.read(bundle)
    except BadBundle as error:
        raise Failure(f"the candidate of run {run} must not be signed: {error}") from error
    return (bundle / bundles.CARD).read_text(encoding="utf-8")
