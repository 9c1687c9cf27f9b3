"""The state of each step of the loop train → gate → sign → roll out → serve → watch.

Pure: from what the tables say to one word and one sentence per step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the loop's state follows from."""

    run: Row | None
    """The newest run that is not merely proposed, as :func:`atoll.server.web_runs.run_row`."""
    rounds: int
    """Rounds of its plan that are over."""
    release: Row | None
    rollout: Row | None
    devices: Sequence[Row]
    """Devices that are not revoked, as :func:`atoll.server.web_devices.fleet_rows`."""
    proposed: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the loop: its state as a word with a tone, and what there is to say."""

    name: str
    state: str
    text: str
    link: str


def steps(facts: Facts) -> list[Step]:
    """Return the six steps in order."""
    return [
        _train(facts),
        _gate(facts),
        _sign(facts),
        _roll_out(facts),
        _serve(facts),
        _watch(facts),
    ]


def _train(facts: Facts) -> Step:
    run = facts.run
    if run is None:
        return Step("Train", "idle", "no plan has run yet", "/runs")
    link = f"/runs/{run['id']}"
    if run["state"] == "running" and run["stage"] in ("", "train"):
        return Step(
            "Train", "running", f"{run['name']}: round {facts.rounds} of {run['rounds']}", link
        )
    if run["state"] in ("failed", "cancelled") and not facts.rounds:
        return Step("Train", run["state"], run["reason"] or run["name"], link)
    if run["state"] == "approved":
        return Step("Train", "approved", f"{run['name']} starts soon", link)
    return Step("Train", "done", f"{run['name']}: {facts.rounds} rounds", link)


def _gate(facts: Facts) -> Step:
    run = facts.run
    if run is None or run["state"] == "approved":
        return Step("Gate", "idle", "nothing to judge yet", "/runs")
    link = f"/runs/{run['id']}"
    if run["state"] == "running":
        if run["stage"] in ("", "train"):
            return Step("Gate", "waiting", "for training to end", link)
        return Step("Gate", "running", run["stage"], link)
    if run["state"] in ("failed", "cancelled"):
        return Step("Gate", run["state"], run["reason"], link)
    gates: Sequence[Row] = run["gates"]
    held = sum(1 for gate in gates if gate["passed"])
    text = f"{held} of {len(gates)} gates hold" if gates else ""
    return Step("Gate", "rejected" if run["state"] == "rejected" else "passed", text, link)


def _sign(facts: Facts) -> Step:
    if facts.run is not None and facts.run["state"] == "gated":
        return Step("Sign", "gated", "a candidate waits for the offline key", "/models")
    if facts.release is None:
        return Step("Sign", "idle", "no release yet", "/models")
    release = facts.release
    return Step("Sign", "published", f"{release['model']} {release['release']}", "/models")


def _roll_out(facts: Facts) -> Step:
    rollout = facts.rollout
    if rollout is None:
        return Step("Roll out", "idle", "nothing rolled out yet", "/models")
    wanted = (rollout["model"], rollout["release"])
    served = sum(
        1
        for row in facts.devices
        if row["id"] in rollout["targets"] and (row["model"], row["release"]) == wanted
    )
    text = f"{rollout['model']} {rollout['release']} on {served} of {len(rollout['targets'])}"
    return Step("Roll out", rollout["state"], rollout["reason"] or text, "/models")


def _serve(facts: Facts) -> Step:
    serving = sum(1 for row in facts.devices if row["model"] and row["release"] is not None)
    failed = sum(1 for row in facts.devices if row["serving_state"] == "failed")
    if failed:
        return Step("Serve", "warning", f"{serving} serve, {failed} could not switch", "/devices")
    if not serving:
        return Step("Serve", "idle", "no device serves a model", "/devices")
    return Step("Serve", "serving", f"{serving} of {len(facts.devices)} devices", "/devices")


def _watch(facts: Facts) -> Step:
    watched = [row["drift_state"] for row in facts.devices if row["drift_state"]]
    drifted = watched.count("drifted")
    if drifted:
        more = "; a run is proposed" if facts.proposed else ""
        return Step("Watch", "drifted", f"{drifted} of {len(watched)} devices{more}", "/alerts")
    if not watched:
        return Step("Watch", "idle", "no windows counted yet", "/devices")
    if "stable" not in watched:
        return Step("Watch", "too-few-rows", f"on {len(watched)} devices so far", "/devices")
    return Step("Watch", "stable", f"{watched.count('stable')} devices", "/devices")
