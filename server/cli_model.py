"""``atoll model``: sign what a run has made, bring it to the devices, take it back."""

import time
from typing import Annotated, Any, Final

import typer

from atoll.server import cli_publish
from atoll.server.cli_options import Data, Json, connect, guarded
from atoll.server.client import Failure, HubClient
from atoll.server.tables import ago, clean, note, put, put_json, put_table

app = typer.Typer(help="Publish models, roll them out and back.", no_args_is_help=True)
app.command("publish")(cli_publish.publish)

ModelName = Annotated[str, typer.Argument(help="The model's name.", metavar="MODEL")]
Watch = Annotated[bool, typer.Option("--watch", help="Stay until the rollout ends.")]

POLL_SECONDS: Final = 1.0
MOVING: Final = ("canary", "rolling")


@app.command("list")
@guarded
def list_models(*, data: Data = None, as_json: Json = False) -> None:
    """List the models and their releases, newest first."""
    found = connect(data).get("models")
    if as_json:
        put_json(found)
        return
    now = time.time()
    put_table(
        ["Model", "Release", "Published", "By", "Run", "Rollout"],
        [
            [
                release["model"],
                release["release"],
                ago(release["published_at"], now),
                release["published_by"],
                release["run"] or "",
                _rollout_of(model, release["release"]),
            ]
            for model in found
            for release in model["releases"]
        ],
        "No model is published yet; `atoll model publish RUN` publishes what a run has made.",
    )


@app.command("roll-out")
@guarded
def roll_out(
    model: ModelName,
    *,
    release: Annotated[int | None, typer.Option(help="(default: the newest)", min=1)] = None,
    canary: Annotated[
        list[str] | None,
        typer.Option(help="A device to try it on first; may be repeated. (default: the hub picks)"),
    ] = None,
    watch: Watch = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Bring a release to the devices: to the canaries first, then to the rest.

    With --watch, ends with status 1 when the rollout is halted.
    """
    client = connect(data)
    body = {"release": release, "canaries": canary or None}
    made = client.post("models", model, "roll-out", body=body)
    _report(client, model, made["id"], watch=watch, as_json=as_json)


@app.command("roll-back")
@guarded
def roll_back(
    model: ModelName,
    *,
    reason: Annotated[str, typer.Option(help="Goes into the audit log.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Return the devices of the newest rollout to the release that it may fall back to."""
    client = connect(data)
    made = client.post("models", model, "roll-back", body={"reason": reason})
    _report(client, model, made["id"], watch=False, as_json=as_json)


def _report(client: HubClient, model: str, rollout: int, *, watch: bool, as_json: bool) -> None:
    """Print a rollout, at its end if it is watched."""
    shown = ""
    while (now := _rollout(client, model, rollout))["state"] in MOVING and watch:
        line = _line(client, now)
        if line != shown:
            note(line)
            shown = line
        time.sleep(POLL_SECONDS)
    if as_json:
        put_json(now)
    else:
        put(_line(client, now))
    if watch and now["state"] != "done":
        raise Failure(f"the rollout is {now['state']}: {now['reason']}")


def _rollout(client: HubClient, model: str, rollout: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = client.get("models")
    return next(
        one
        for found_model in found
        if found_model["model"] == model
        for one in found_model["rollouts"]
        if one["id"] == rollout
    )


def _line(client: HubClient, rollout: dict[str, Any]) -> str:
    targets = set(rollout["targets"])
    serving = sum(
        (device["reported"] or {}).get("model") == rollout["model"]
        and (device["reported"] or {}).get("release") == rollout["release"]
        for device in client.get("devices")
        if device["id"] in targets
    )
    reason = f": {rollout['reason']}" if rollout["reason"] else ""
    return clean(
        f"{rollout['model']} {rollout['release']}: {rollout['state']}, "
        f"{serving} of {len(targets)} devices serve it{reason}"
    )


def _rollout_of(model: dict[str, Any], release: int) -> str:
    for rollout in model["rollouts"]:
        if rollout["release"] == release:
            return str(rollout["state"])
    return ""
