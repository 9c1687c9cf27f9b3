"""``atoll model``: sign what a run has made, bring it to the devices, take it back."""

import time
from typing import Annotated, Any

import typer
from atoll.server.cli_options import Data, Json, connect, guarded
from atoll.server.client import Failure, HubClient
from atoll.server.tables import ago, clean, note, put, put_json, put_table

app = typer.Typer(help="Publish models, roll them out and back.", no_args_is_help=True)

ModelName = Annotated[str, typer.Argument(help="The model's name.", metavar="MODEL")]
Watch = Annotated[bool, typer.Option("--watch", help="Stay until the rollout ends.")]

POLL_SECONDS = 1.0
MOVING = ("canary", "rolling")


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
    wanted = newest(client, model) if release is None else release
    body: dict[str, object] = {"release": wanted}
    if canary:
        body["canaries"] = canary
    client.post("models", model, "roll-out", body=body)
    _report(client, model, watch=watch, as_json=as_json)


@app.command("roll-back")
@guarded
def roll_back(
    model: ModelName, *, watch: Watch = False, data: Data = None, as_json: Json = False
) -> None:
    """Bring the devices back to the release that the newest one names as its fallback."""
    client = connect(data)
    client.post("models", model, "roll-back")
    _report(client, model, watch=watch, as_json=as_json)


def find(client: HubClient, model: str) -> dict[str, Any]:
    """Return a published model; raise :class:`Failure` when there is none of that name."""
    found: list[dict[str, Any]] = client.get("models")
    for one in found:
        if one["model"] == model:
            return one
    names = ", ".join(one["model"] for one in found) or "none"
    raise Failure(f"there is no published model {model!r} (there are: {names})")


def newest(client: HubClient, model: str) -> int:
    """Return a model's newest release; raise :class:`Failure` when there is none."""
    return max(int(release["release"]) for release in find(client, model)["releases"])


def _report(client: HubClient, model: str, *, watch: bool, as_json: bool) -> None:
    """Print the newest rollout of a model, at its end if it is watched."""
    rollout = find(client, model)["rollouts"][0]
    shown = ""
    while watch and rollout["state"] in MOVING:
        line = _line(client, rollout)
        if line != shown:
            note(line)
            shown = line
        time.sleep(POLL_SECONDS)
        rollout = find(client, model)["rollouts"][0]
    if as_json:
        put_json(rollout)
    else:
        put(_line(client, rollout))
    if watch and rollout["state"] not in ("done", "rolled-back"):
        raise Failure(f"the rollout is {rollout['state']}: {rollout['reason']}")


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
