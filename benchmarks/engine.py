"""What a round of the in-process engine costs for each device beside its training.

    python -m benchmarks.engine [--json] [--parameters 8000,1000000] [--devices 50] [--rounds 5]
                                [--alone]

A round of a plan in the clear with a client that does nothing: it reads what it was sent and
answers with ones, which are checked, laid out, carried, checked again and added like any update.
So the figure holds all that the engine does for a client update, and each device's share of what
it does once in a round: the least of several rounds' seconds, divided by the devices. Seconds are
CPU time, since nothing here ever waits.

Two things are told beside it. What a device does to a real update before it can be summed, which
is to clip it, to round it at random and to write it as integers; a client pays for that, as it
pays for training. And the same by Flower's simulation on Ray, whose client returns the arrays that
it was sent (:mod:`benchmarks.peers.flower_ray`), in an environment of its own and by the clock,
since it works in many processes; ``--alone`` leaves it out.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from atoll.federation import local_update, messages, plan, release, rounds
from atoll.federation.cohort import Cohort, Member
from atoll.federation.engine import InProcessGrid
from atoll.federation.riders import Riders
from atoll.federation.run import RoundReport, Run
from atoll.privacy.keystream import Keystream
from atoll.privacy.modes import hub_session
from atoll.privacy.plain import PlainParty
from atoll.privacy.sums import Integers
from benchmarks.peers import environments
from benchmarks.process import least_cpu_time
from benchmarks.rows import Row, report

GOALS: Final = {8_000: 0.5, 1_000_000: 3.0}
"""Milliseconds a client update, by the number of parameters."""

_REPEATS: Final = 5

_PLAN: Final = """
name = "overhead"
task = "nothing"
model = "nothing"
rounds = {rounds}
cohort = {{ min_devices = {devices} }}
privacy = {{ mode = "plain", noise_multiplier = 0.0 }}
"""


def idle(device: str, term: Integers) -> ClientApp:
    """Return a ClientApp that always comes to ``term``, int64, and has it already."""
    app = ClientApp()

    @app.train()
    def contribute(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.SumAsk)
        messages.unpack(message.content, messages.TrainAsk)
        # One that remembered its answer would keep a copy of it for every device.
        answer = PlainParty(device).answer(ask.spec, ask.phase, ask.payload, term)
        content = messages.pack(messages.SumReply(payload=answer), messages.TrainReply(loss=0.0))
        return Message(content, reply_to=message)

    return app


def plan_of(devices: int, count: int) -> plan.Plan:
    """Return a plan of ``count`` rounds in which every device counts."""
    return plan.loads(_PLAN.format(rounds=count, devices=devices))


def seconds_a_round(parameters: int, devices: int, count: int, value: int = 1) -> list[float]:
    """Return the CPU time of each of ``count`` rounds; every update must be in each of them.

    An update is ``parameters`` times ``value``.
    """
    names = [f"device-{number}" for number in range(devices)]
    members = {name: Member(number + 1, b"") for number, name in enumerate(names)}
    cohort = Cohort(members, names, names)
    term = np.full(parameters, value, np.int64)
    grid = InProcessGrid({member.node_id: idle(name, term) for name, member in members.items()})
    ends: list[float] = []

    def on_round(done: RoundReport) -> None:
        ends.append(time.process_time())
        assert len(done.survivors) == devices, done.dropped

    began = time.process_time()
    run = Run(
        grid,
        plan_of(devices, count),
        cohort,
        name="benchmark",
        session=hub_session("plain", {}),
        charge=lambda *_: None,
        on_round=on_round,
        clock=grid.clock,
    )
    rounds.run_rounds(run, np.zeros(parameters, np.float32))
    return [float(seconds) for seconds in np.diff([began, *ends])]


def encoding(parameters: int, devices: int) -> float:
    """Return the seconds that a device takes to make a term of a change."""
    the_plan = plan_of(devices, 1)
    change = np.random.default_rng(0).normal(size=parameters).astype(np.float32)
    spec = release.update_spec(the_plan, the_plan.privacy.clip_norm)
    riders, rng = Riders.of(the_plan), Keystream.replayable(0)
    how = the_plan.training
    return least_cpu_time(
        lambda: local_update.encoded(change, 1, 1, how, riders, spec, rng), _REPEATS
    )[1]


def flowers(parameters: int, devices: int, count: int) -> float | None:
    """Return the seconds of a round of Flower on Ray, the least of several; none without it."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "weights.npy", np.zeros(parameters, np.float32))
        given = {
            "folder": folder,
            "work": "echo",
            "clients": devices,
            "warm": 1,
            "rounds": count,
            "actors": os.cpu_count(),
            "threads": 1,
        }
        try:
            said = environments.run("flower-ray", environments.FOLDER / "flower_ray.py", given)
        except environments.PeerMissing as error:
            print(f"Flower on Ray: left out; {error}", file=sys.stderr)
            return None
    return min(float(seconds) for seconds in said["seconds"])


def rows(parameters: Sequence[int], devices: int, count: int, *, alone: bool) -> list[Row]:
    """Measure every size of model; ``alone`` without Flower."""
    found = []
    for size in parameters:
        ours = 1e3 * min(seconds_a_round(size, devices, count)) / devices
        theirs = None if alone else flowers(size, devices, count)
        peer = None if theirs is None else 1e3 * theirs / devices
        goal = GOALS.get(size)
        case = f"{size:,} parameters, {devices} devices"
        found.append(
            Row(
                case=case,
                metric="engine, a client update",
                unit="ms",
                ours=ours,
                peer=peer,
                peer_name=None if peer is None else "Flower on Ray",
                ratio=None if peer is None else peer / ours,
                goal=goal,
                met=None if goal is None else ours <= goal,
            )
        )
        found.append(
            Row(
                case=case,
                metric="device, from a change to its term",
                unit="ms",
                ours=1e3 * encoding(size, devices),
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--parameters", type=_numbers, default=list(GOALS))
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="leave Flower on Ray out")
    given = parser.parse_args(arguments)
    found = rows(given.parameters, given.devices, given.rounds, alone=given.alone)
    return report(found, given.json)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
