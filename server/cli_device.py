"""``atoll device``: who belongs to the fleet."""

import time
from typing import Annotated, Any

import typer

from atoll.fleet.errors import BadDeviceId
from atoll.fleet.topics import check_device_id
from atoll.server.cli_options import Data, Json, Yes, agreed, connect, guarded
from atoll.server.client import Misuse
from atoll.server.tables import (
    ago,
    device_state,
    labels,
    note,
    put,
    put_facts,
    put_json,
    put_table,
    read_span,
    span,
)

app = typer.Typer(help="Let devices in, look at them, put them out.", no_args_is_help=True)

DeviceId = Annotated[str, typer.Argument(help="The device's id.", metavar="ID")]


@app.command("token")
@guarded
def make_token(
    *,
    device: Annotated[
        str | None, typer.Option(help="Id the device will have. (default: it names itself)")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A label, key=value; may be repeated.")
    ] = None,
    ttl: Annotated[str, typer.Option(help="How long it can be used: 90s, 30m, 24h, 7d.")] = "24h",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a one-time enrolment token, and print it alone on standard output.

    It holds a secret: hand it over as you would a password. It works once.
    """
    wanted = None if device is None else check_id(device)
    body = {"device": wanted, "labels": read_labels(label or []), "ttl": (life := _seconds(ttl))}
    made = connect(data).post("tokens", body=body)
    if as_json:
        put_json(made)
        return
    put(made["token"])
    note(f"It works once, within {span(life)}. On the device:\n  atoll-agent enrol --token TOKEN")


@app.command("list")
@guarded
def list_devices(*, data: Data = None, as_json: Json = False) -> None:
    """List the devices."""
    found = connect(data).get("devices")
    if as_json:
        put_json(found)
        return
    now = time.time()
    put_table(
        ["Device", "State", "Serves", "Doing", "Heard", "Labels"],
        [
            [
                device["id"],
                device_state(device),
                serving(device),
                doing(device),
                ago(device["last_seen"], now),
                labels(device["labels"]),
            ]
            for device in found
        ],
        "No device has enrolled yet; `atoll device token` makes a token for one.",
    )


@app.command("show")
@guarded
def show_device(device: DeviceId, *, data: Data = None, as_json: Json = False) -> None:
    """Show one device."""
    checked = check_id(device)
    found = connect(data).get("devices", checked)
    if as_json:
        put_json(found)
        return
    now = time.time()
    health = found.get("health") or {}
    reported = found.get("reported") or {}
    put_facts(
        {
            "device": found["id"],
            "state": device_state(found),
            "labels": labels(found["labels"]),
            "enrolled": ago(found["enrolled_at"], now),
            "certificate": f"runs out in {span(max(0.0, found['expires_at'] - now))}",
            "last heard": ago(found["last_seen"], now),
            "agent": found["agent_version"],
            "serves": serving(found),
            "serves at": found["serve_url"],
            "doing": doing(found),
            "error": reported.get("error"),
            **told(health),
            "memory": _memory(health.get("rss") or {}),
            "outbox": f"{health['outbox_waiting']} waiting, {health['outbox_dropped']} dropped"
            if health
            else None,
            "bytes": f"{found['https_up'] + found['mqtt_up']:,} up, {found['https_down']:,} down",
        }
    )


@app.command("revoke")
@guarded
def revoke_device(
    device: DeviceId,
    *,
    reason: Annotated[str, typer.Option(help="Goes into the audit log.")] = "",
    yes: Yes = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Put a device out of the fleet, for good: broker, API and SuperLink refuse it from now on.

    Asks first when it is typed at a terminal.
    """
    checked = check_id(device)
    client = connect(data)
    agreed(f"Put {checked} out of the fleet? Its certificate never works again.", yes=yes)
    done = client.post("devices", checked, "revoke", body={"reason": reason})
    if as_json:
        put_json(done)
    else:
        put(f"{checked} is revoked.")


def serving(device: dict[str, Any]) -> str:
    """Return the model and release that a device says it serves."""
    reported = device.get("reported") or {}
    if reported.get("release") is None:
        return "–"
    return f"{reported['model']} {reported['release']}"


def told(health: dict[str, Any]) -> dict[str, object]:
    """Return what a device told of itself that cohort rules may ask for."""
    examples = health.get("examples")
    return {
        **{fact: health.get(fact) for fact in ("power", "network", "accelerator")},
        "examples": None if examples is None else f"{examples:,} or more to train on",
    }


def doing(device: dict[str, Any]) -> str:
    """Return what a device does about what is wanted of it."""
    if device.get("revoked_at") is not None:
        return ""
    reported = device.get("reported") or {}
    words = [reported.get("state", "nothing reported")]
    if (device.get("desired") or {}).get("train"):
        words.append("training window open")
    return ", ".join(words)


def check_id(device: str) -> str:
    """Return a device id; raise :class:`Misuse` for one that cannot be."""
    try:
        return check_device_id(device)
    except BadDeviceId as error:
        raise Misuse(str(error)) from error


def read_labels(given: list[str]) -> dict[str, str]:
    """Return ``key=value`` pairs as a mapping; raise :class:`Misuse`."""
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise Misuse(f"label {text!r} is not of the form key=value")
        pairs[key] = value
    return pairs


def _seconds(ttl: str) -> float:
    try:
        return read_span(ttl)
    except ValueError:
        raise Misuse(f"--ttl {ttl!r} is no duration: write it as 90s, 30m, 24h or 7d") from None


def _memory(rss: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sorted(rss.items()))
