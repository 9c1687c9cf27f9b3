"""``atoll demo``: the whole loop on real data, in front of the user.

A hub and ten agents, each the real program in a process of its own; each device holds one
person's recordings of the SPAR set. This module plays the people around them: the operator who
approves, signs and rolls out, the ten wearers, and the one who puts the watch on the wrong way
round.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from atoll.federation import plan as plans
from atoll.federation.task import Examples
from atoll.privacy.mode import MODES, Mode
from atoll.server.errors import HubError
from atoll.simulations import demo_report
from atoll.simulations.local_fleet import FleetFailed, LocalFleet
from atoll.simulations.spar import PEOPLE, Spar, split_people
from atoll.simulations.steps import Say, Steps
from atoll.simulations.traffic import (
    Served,
    TrafficFailed,
    feed_all,
    shuffled_halves,
    turned,
)

PLAN: Final = Path(__file__).with_name("spar.toml")
UNSEEN: Final = (9, 10)
"""People who only evaluate and serve."""
TURNED: Final = 3
"""The person whose watch is turned."""
TRAFFIC_STEP: Final = 10
"""A watch hands over its last four seconds every fifth of a second."""
MARK: Final = ".atoll-demo"
LOG_WIDTH: Final = 110
ONLINE_SECONDS: Final = 90.0
RUN_SECONDS: Final = 480.0
ROLLOUT_SECONDS: Final = 120.0
DRIFT_SECONDS: Final = 60.0
MEMORY_SECONDS: Final = 10.0


def name_of(person: int) -> str:
    """Return the id of a person's device."""
    return f"person-{person:02d}"


DEVICES: Final = tuple(name_of(person) for person in PEOPLE)
WRONG_WAY: Final = name_of(TURNED)


def fresh(root: Path) -> None:
    """Make ``root`` an empty directory; only what an earlier demo left is removed.

    Raises :class:`FleetFailed` for a directory that holds anything else.
    """
    if root.exists() and any(root.iterdir()):
        if not (root / MARK).exists():
            raise FleetFailed(
                f"{root} holds something that is not of an earlier demo; name another with --data"
            )
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARK).touch()


def plan_text(mode: Mode) -> str:
    """Return the demo's plan with its sums in ``mode``."""
    return re.sub(r'(?m)^mode = ".*"$', f'mode = "{mode}"', plans.read(PLAN))


def deal_and_enrol(fleet: LocalFleet, mode: Mode, say: Say) -> None:
    """Give each device its person's recordings, enrol it and start its agent."""
    say("dealing out the recordings")
    dealt = split_people(fleet.root / "recordings")

    def one(person: int) -> None:
        device = name_of(person)
        role = "evaluate" if person in UNSEEN else "train"
        fleet.enrol(device, {"role": role})
        shutil.move(dealt[person], fleet.device_data(device) / "data")
        options = ["--window-rows", "32", "--window-seconds", "3", "--health-seconds", "5"]
        if mode == "plain":
            options.append("--allow-plain")
        fleet.start_device(device, *options)

    with ThreadPoolExecutor(2) as pool:
        for count, _ in enumerate(pool.map(one, PEOPLE), 1):
            say(f"{count} of {len(PEOPLE)} enrolled")

    def all_online() -> bool:
        online = sum(bool(device["online"]) for device in fleet.devices().values())
        say(f"{len(PEOPLE)} enrolled, {online} online")
        return online == len(PEOPLE)

    fleet.wait("all devices to come online", all_online, ONLINE_SECONDS)


class Memory:
    """The most memory that each device's processes had, as their health reports say.

    ``peaks`` holds resident bytes by device and process.
    """

    def __init__(self, fleet: LocalFleet) -> None:
        self.peaks: dict[str, dict[str, int]] = {name: {} for name in DEVICES}
        self._fleet = fleet
        self._next = 0.0

    def look(self, now: float) -> None:
        """Read the latest reports, if some time has passed since the last look."""
        if now < self._next:
            return
        self._next = now + MEMORY_SECONDS
        for name, peaks in self.peaks.items():
            health = self._fleet.call("GET", f"/devices/{name}")["health"] or {}
            for part, size in health.get("rss", {}).items():
                peaks[part] = max(peaks.get(part, 0), size)


def train(fleet: LocalFleet, text: str, memory: Memory, say: Say) -> dict[str, Any]:
    """Propose the run, approve it, and follow it until its candidate waits to be signed."""
    plan = plans.loads(text)
    run = fleet.call("POST", "/runs", {"plan": text, "reason": "first model"})["id"]
    fleet.call("POST", f"/runs/{run}/approve")

    def settled() -> dict[str, Any] | None:
        seen: dict[str, Any] = fleet.call("GET", f"/runs/{run}")
        say(progress(seen, plan.rounds))
        memory.look(time.monotonic())
        if seen["state"] in {"failed", "rejected", "cancelled"}:
            raise FleetFailed(f"the run {seen['state']}: {seen['reason']}")
        return seen if seen["state"] == "gated" else None

    return fleet.wait("the run to end", settled, RUN_SECONDS, every=0.5)


def progress(run: Mapping[str, Any], rounds: int) -> str:
    """Say in a line where a run is."""
    done = run["rounds"]
    if not done:
        return f"{run['stage'] or run['state']}: waiting for the devices' training processes"
    last = done[-1]
    text = f"{run['stage']}: round {len(done)} of {rounds}"
    if last["loss"] is not None:
        text += f", loss {last['loss']:.3f}"
    if last["epsilon"] is not None:
        text += f", ε {last['epsilon']:,.0f}"
    return text


def roll_out(fleet: LocalFleet, run: str, model: str, say: Say) -> int:
    """Sign the candidate with the offline key and follow the rollout; return the release."""
    fleet.atoll("model", "publish", run, "--keys", str(fleet.hub / "offline-keys"))
    say("signed; waiting for the canary")
    fleet.atoll("model", "roll-out", model)

    def serving() -> int | None:
        found = next(one for one in fleet.call("GET", "/models") if one["model"] == model)
        rollout = found["rollouts"][0]
        reported = [device["reported"] or {} for device in fleet.devices().values()]
        count = sum(
            one.get("state") == "serving" and one.get("release") == rollout["release"]
            for one in reported
        )
        say(f"{rollout['state']}: {count} of {len(DEVICES)} serve release {rollout['release']}")
        if rollout["state"] in {"halted", "rolled-back"}:
            raise FleetFailed(f"the rollout was {rollout['state']}: {rollout['reason']}")
        return int(rollout["release"]) if rollout["state"] == "done" else None

    return fleet.wait("the rollout to end", serving, ROLLOUT_SECONDS)


def drift_of(fleet: LocalFleet) -> dict[str, dict[str, Any]]:
    """Return the latest drift assessment by device."""
    return {row["device"]: row for row in fleet.call("GET", "/drift")}


def watch(
    fleet: LocalFleet, model: str, say: Say
) -> tuple[dict[str, Served], dict[str, Served], list[dict[str, Any]]]:
    """Feed the wearers' windows, turn one watch, and wait for the alert.

    Returns what was served before and after the turn, and the alerts.
    """
    task = Spar()
    halves = {
        name_of(person): shuffled_halves(
            task.held_back(fleet.device_data(name_of(person)) / "data", TRAFFIC_STEP), seed=person
        )
        for person in PEOPLE
    }
    urls = {name: device["serve_url"] for name, device in fleet.devices().items()}
    say("every watch worn as usual")
    usual = feed_all(urls, model, {name: half[0] for name, half in halves.items()})
    say("the baselines reach the hub")
    fleet.wait(
        "every device's baseline", lambda: len(drift_of(fleet)) == len(DEVICES), DRIFT_SECONDS
    )
    later = {name: half[1] for name, half in halves.items()}
    later[WRONG_WAY] = Examples(turned(later[WRONG_WAY].x), later[WRONG_WAY].y)
    say(f"{WRONG_WAY} wears the watch the wrong way round")
    after = feed_all(urls, model, later)

    def judged() -> bool:
        states = {name: row["state"] for name, row in drift_of(fleet).items()}
        known = sum(state != "too-few-rows" for state in states.values())
        say(f"{known} of {len(DEVICES)} devices judged")
        return known == len(DEVICES) and bool(states[WRONG_WAY] == "drifted")

    fleet.wait("the drift to show", judged, DRIFT_SECONDS)
    alerts = [alert for alert in fleet.call("GET", "/alerts") if alert["kind"] == "drift"]
    proposed = [run for run in fleet.call("GET", "/runs") if run["state"] == "proposed"]
    drifted = [name for name, row in drift_of(fleet).items() if row["state"] == "drifted"]
    say(f"drifted: {', '.join(drifted)}; {len(proposed)} retraining run waits for approval")
    return usual, after, alerts


class Reference:
    """Central training and federation without noise on the same data, for comparison.

    A process of its own at low priority, beside the real loop: it holds what no hub may.
    """

    def __init__(self, root: Path) -> None:
        self._log = root / "logs" / "reference.log"
        self._log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "atoll.simulations.reference", "--json"]
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                ["nice", "-n", "10", *command], stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def result(self) -> dict[str, Any]:
        """Wait for it; raise :class:`FleetFailed` when it failed."""
        output, _ = self._process.communicate()
        if self._process.returncode:
            raise FleetFailed(f"the comparison failed; see {self._log}")
        result: dict[str, Any] = json.loads(output)
        return result

    def stop(self) -> None:
        """End it if it still runs."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        self._process.wait()


def play(fleet: LocalFleet, mode: Mode, console: Console) -> dict[str, Any]:
    """Run the loop once and return the facts of :mod:`atoll.simulations.demo_report`."""
    began = time.monotonic()
    text = plan_text(mode)
    plan = plans.loads(text)
    steps = Steps(console, total=7)
    reference, memory = Reference(fleet.root), Memory(fleet)
    try:
        with steps.step("Start the hub") as say:
            fleet.start_hub()
            say(f"CA, API, dashboard, broker, SuperLink; dashboard at {fleet.operator['url']}")
        with steps.step("Enrol ten devices") as say:
            deal_and_enrol(fleet, mode, say)
        with steps.step("Train, evaluate, quantise, gate") as say:
            run = train(fleet, text, memory, say)
        with steps.step("Sign and roll out") as say:
            release = roll_out(fleet, run["id"], plan.model, say)
        with steps.step("Serve, and turn one watch round") as say:
            usual, after, alerts = watch(fleet, plan.model, say)
        with steps.step("Compare with training in one place") as say:
            say("central training and federation without noise, on the same windows")
            compared = reference.result()
        with steps.step("Gather the numbers"):
            memory.look(time.monotonic())
            facts = demo_report.gather(
                plan=plan,
                run=fleet.call("GET", f"/runs/{run['id']}"),
                release=release,
                devices={name: fleet.call("GET", f"/devices/{name}") for name in sorted(DEVICES)},
                memory=memory.peaks,
                unseen={name_of(person) for person in UNSEEN},
                drift=drift_of(fleet),
                served=(usual, after),
                turned=WRONG_WAY,
                alerts=alerts,
                proposed=[one for one in fleet.call("GET", "/runs") if one["state"] == "proposed"],
                reference=compared,
                ledger=fleet.call("GET", f"/ledger?delta={plan.privacy.delta}"),
                url=fleet.operator["url"],
            )
    finally:
        reference.stop()
    facts["seconds"] = {**steps.seconds, "all": time.monotonic() - began}
    return facts


def main(root: Path, *, mode: Mode = "he", once: bool = False, as_json: bool = False) -> None:
    """Play the demo under ``root``; with ``once`` end at the table instead of staying up.

    Raises :class:`FleetFailed` or :class:`TrafficFailed`.
    """
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    fresh(root)
    with LocalFleet(root) as fleet:
        facts = play(fleet, mode, console)
        if as_json:
            print(json.dumps(facts, indent=2))  # noqa: T201 -- the result, for programs
        else:
            demo_report.show(facts, console)
        if once:
            return
        login = fleet.atoll("login").strip()
        console.print(f"\nThe dashboard is open: [link={login}]{login}[/link]", highlight=False)
        console.print("Ctrl-C ends hub and devices.", highlight=False)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def command(arguments: list[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(prog="atoll demo", description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end at the table")
    parser.add_argument(
        "--json", action="store_true", help="print the facts as JSON; implies --once"
    )
    parser.add_argument(
        "--mode", choices=MODES, default="he", help="how updates are summed (default: he)"
    )
    parser.add_argument("--data", type=Path, default=Path(".demo"), help="where it all lives")
    given = parser.parse_args(arguments)
    try:
        main(
            given.data.resolve(),
            mode=given.mode,
            once=given.once or given.json,
            as_json=given.json,
        )
    except (FleetFailed, TrafficFailed, HubError) as error:
        sys.exit(f"atoll demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    command()
