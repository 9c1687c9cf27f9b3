"""What privacy costs a round of the demo: the same plan summed in the clear and in private.

    python -m benchmarks.private_round [--rounds 10] [--json]

A hub and the demo's eight training devices run as programs of their own on this machine, over the
real SuperLink with mutual TLS. Each mode's plan is that of ``atoll demo``; in ``plain`` it has no
noise. The figure is the median of the rounds after the first, which sets up keys and loads code.
"""

import argparse
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from atoll.privacy.mode import MODES, Mode
from atoll.simulations.demo import UNSEEN, name_of, plan_text
from atoll.simulations.local_fleet import LocalFleet
from atoll.simulations.spar import PEOPLE, split_people
from benchmarks.rows import Row, report

GOAL: Final = 1.5
"""How many times the plain round a masked one may take."""
_DONE: Final = 600.0


def plan_for(mode: Mode, rounds: int) -> str:
    """Return the demo's plan in ``mode``, cut to ``rounds``; without noise in the clear."""
    text = plan_text(mode)
    changes: dict[str, object] = {"rounds": rounds, "averaged_rounds": 1}
    if mode == "plain":
        changes["noise_multiplier"] = 0.0
    for field, value in changes.items():
        text = re.sub(rf"(?m)^{field} = .*$", f"{field} = {value}", text)
    return text


def start(fleet: LocalFleet) -> None:
    """Start a hub and the people who train."""
    fleet.start_hub()
    people = [person for person in PEOPLE if person not in UNSEEN]
    dealt = split_people(fleet.root / "recordings", people)
    for person in people:
        device = name_of(person)
        fleet.enrol(device, {"role": "train"})
        shutil.move(dealt[person], fleet.device_data(device) / "data")
        fleet.start_device(device, "--allow-plain")
    fleet.wait("the devices", lambda: all(d["online"] for d in fleet.devices().values()), 120)


def rounds_of(fleet: LocalFleet, mode: Mode, rounds: int) -> list[dict[str, Any]]:
    """Run a plan to its end and return its rounds."""
    run = fleet.call("POST", "/runs", {"plan": plan_for(mode, rounds)})["id"]
    fleet.call("POST", f"/runs/{run}/approve")

    def ended() -> dict[str, Any] | None:
        seen: dict[str, Any] = fleet.call("GET", f"/runs/{run}")
        return seen if seen["state"] not in {"approved", "running"} else None

    found: list[dict[str, Any]] = fleet.wait("the run", ended, _DONE, every=1.0)["rounds"]
    print(f"{mode}: {[round(one['seconds'], 2) for one in found]}", file=sys.stderr, flush=True)
    return found


def measure(rounds: int) -> list[Row]:
    """Return a row for each private mode, with the plain round beside it."""
    seconds: dict[Mode, float] = {}
    with tempfile.TemporaryDirectory() as root, LocalFleet(Path(root)) as fleet:
        start(fleet)
        for mode in MODES:
            found = rounds_of(fleet, mode, rounds)[1:]
            seconds[mode] = statistics.median(one["seconds"] for one in found)
    plain = seconds["plain"]
    return [
        Row(
            case=f"{mode}, noise on, eight devices of the demo",
            metric="round",
            unit="s",
            ours=seconds[mode],
            peer=plain,
            peer_name="the same round summed in the clear, without noise",
            ratio=plain / seconds[mode],
            goal=GOAL * plain if mode == "secagg" else None,
            met=seconds[mode] <= GOAL * plain if mode == "secagg" else None,
        )
        for mode in MODES
        if mode != "plain"
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private_round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    return report(measure(given.rounds), given.json)


if __name__ == "__main__":
    sys.exit(main())
