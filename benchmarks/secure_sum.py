"""What a private sum costs in bytes, time and memory, by mode and size of model and cohort.

    python -m benchmarks.secure_sum [--json] [--parameters 10000,100000,…] [--devices 10,100]
                                    [--modes he,secagg,plain]

Peers in the same run: the CKKS encryption of NVIDIA FLARE (:mod:`benchmarks.peers.ckks`),
float32 arrays added as they are, and a bare addition modulo 2**32. Times are CPU time, the
least of several rounds and devices; :mod:`benchmarks.cohort` says how everything is measured.

Noise, where a case has some, is meant to hold for two thirds of the devices; only the room
that its widest value takes matters here.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from atoll.privacy import modes
from atoll.privacy.errors import BadParameters
from atoll.privacy.he import DECRYPT
from atoll.privacy.sums import CONTRIBUTE
from atoll.privacy.update import UpdateSpec
from benchmarks.cohort import Case, Measured, measure
from benchmarks.peers import ckks
from benchmarks.process import least_cpu_time
from benchmarks.rows import Row, report

WORK: Final = 30_000_000
"""Parameters times devices that a case may sum in all of its rounds, where one is not more."""

MOST_ROUNDS: Final = 10

MILLION: Final = 1_000_000
PER: Final = "B/parameter"

HE_BYTES: Final = {9: 5.1, 15: 7.7}
HE_SMALLER: Final = 10
HE_FASTER: Final = 5
SECAGG_BYTES: Final = 2.5
SECAGG_DEVICE: Final = 20.0  # milliseconds a million parameters
SECAGG_HUB: Final = 3  # times a bare addition
GOAL_DEVICES: Final = 10
"""Goals that depend on the size of the cohort are set for this one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How updates of a mode are quantised."""

    bits: int
    noise_multiplier: float

    def __str__(self) -> str:
        noise = f"noise z = {self.noise_multiplier:g}" if self.noise_multiplier else "no noise"
        return f"{self.bits} bits, {noise}"


SETTINGS: Final = {
    "he": (Setting(9, 1), Setting(15, 1)),
    "secagg": (Setting(16, 0), Setting(16, 1)),
    "plain": (Setting(16, 0), Setting(16, 1)),
}


@dataclass(frozen=True, slots=True)
class Added:
    """Seconds to add one update that hides nothing."""

    float32: float
    modular: float


def case_of(mode: str, setting: Setting, parameters: int, devices: int) -> Case:
    """Return the sum to measure; raise :class:`BadParameters` for one that no plan may ask for."""
    survivors = max(2, -(-2 * devices // 3))
    update = UpdateSpec(1.0, setting.bits, setting.noise_multiplier, survivors)
    modes.check(mode, update, parameters, devices)
    rounds = _rounds(parameters * devices)
    return Case(mode, parameters, devices, update.bound, survivors, rounds)


def _rounds(work: int) -> int:
    return min(MOST_ROUNDS, max(1, WORK // work))


def add_plainly(parameters: int) -> Added:
    """Measure the additions that every protocol is compared with."""
    rng = np.random.default_rng(0)
    floats = rng.normal(size=parameters).astype(np.float32)
    words = rng.integers(0, 2**32, parameters, dtype=np.uint32)
    sent, float_sum, word_sum = floats.tobytes(), floats.copy(), words.copy()
    repeats = max(20, 20 * MILLION // parameters)

    def add_floats() -> None:
        np.add(float_sum, np.frombuffer(sent, dtype=np.float32), out=float_sum)

    def add_words() -> None:
        np.add(word_sum, words, out=word_sum)

    return Added(least_cpu_time(add_floats, repeats)[1], least_cpu_time(add_words, repeats)[1])


def rows_of(
    case: Case, setting: Setting, took: Measured, peer: ckks.Costs | None, added: Added
) -> Iterator[Row]:
    """Yield what one case says; ``peer`` where the mode encrypts."""
    name = f"{case.mode}, {_short(case.parameters)} parameters, {case.devices} devices, {setting}"
    if peer is not None:
        yield from _against_ckks(name, case, setting, took, peer)
    elif case.mode == "secagg":
        yield from _against_addition(name, case, setting, took, added)
    else:
        yield from _against_floats(name, case, took, added)
    for phase, cost in took.phases.items():
        if peer is None or phase not in {CONTRIBUTE, DECRYPT}:
            yield _row(name, f"device, {phase}", "ms", 1e3 * cost.seconds)
    yield from _whole(name, case, took)


def _against_ckks(
    name: str, case: Case, setting: Setting, took: Measured, peer: ckks.Costs
) -> Iterator[Row]:
    phases = took.phases
    up = phases[CONTRIBUTE].up / case.parameters
    if case.devices == GOAL_DEVICES:
        yield _row(name, "up, contribution", PER, up, goal=HE_BYTES[setting.bits])
    theirs = (peer.size / case.parameters, peer.name)
    yield _row(name, "up, contribution, against CKKS", PER, up, *theirs, times=HE_SMALLER)
    for metric, seconds, others, times in (
        (
            "device, contribute: encrypt an update",
            phases[CONTRIBUTE].seconds,
            peer.encrypt,
            HE_FASTER,
        ),
        ("hub, add an update", took.receive, peer.add, HE_FASTER),
        ("device, decrypt: open the sum", phases[DECRYPT].seconds, peer.decrypt, None),
    ):
        yield _row(name, metric, "ms", 1e3 * seconds, 1e3 * others, peer.name, times=times)


def _against_addition(
    name: str, case: Case, setting: Setting, took: Measured, added: Added
) -> Iterator[Row]:
    # Set for updates without noise in a model of a million: in a small one, what a message
    # and a signature cost whatever it carries outweighs the rest.
    million = case.parameters == MILLION and not setting.noise_multiplier
    small = million and case.devices == GOAL_DEVICES
    # To two decimals: the 300 bytes of a message's head belong to no parameter.
    up = round(took.phases[CONTRIBUTE].up / case.parameters, 2)
    yield _row(
        name, "up, contribution", PER, up, 4.0, "float32", goal=SECAGG_BYTES if small else None
    )
    device = 1e3 * _device_seconds(took) * MILLION / case.parameters
    goal = SECAGG_DEVICE if small else None
    yield _row(name, "device, all phases, per 1M parameters", "ms", device, goal=goal)
    bare = 1e3 * added.modular
    goal = SECAGG_HUB * bare if million else None
    yield _row(name, "hub, add an update", "ms", 1e3 * took.receive, bare, "uint32 +=", goal=goal)


def _against_floats(name: str, case: Case, took: Measured, added: Added) -> Iterator[Row]:
    up = took.phases[CONTRIBUTE].up / case.parameters
    yield _row(name, "up, contribution", PER, up, 4.0, "float32")
    bare = 1e3 * added.float32
    yield _row(name, "hub, add an update", "ms", 1e3 * took.receive, bare, "float32 +=")


def _whole(name: str, case: Case, took: Measured) -> Iterator[Row]:
    phases, setup = took.phases.values(), took.setup.values()
    up = sum(phase.mean_up for phase in phases)
    down = sum(phase.mean_down for phase in phases)
    most = sum(phase.down for phase in phases)
    yield _row(name, "up, all phases, mean of the devices", PER, up / case.parameters)
    yield _row(name, "down besides weights, mean of the devices", PER, down / case.parameters)
    yield _row(name, "down besides weights, asked in every phase", PER, most / case.parameters)
    yield _row(name, "device, asked in every phase", "ms", 1e3 * _device_seconds(took))
    yield _row(name, "hub, all else in a round", "ms", 1e3 * took.rest)
    yield _row(name, "hub, peak memory", "MB", took.hub_peak / 1e6)
    yield _row(name, "device, peak memory", "MB", took.device_peak / 1e6)
    seconds = sum(phase.seconds for phase in setup)
    carried = sum(phase.mean_up + phase.mean_down for phase in setup)
    yield _row(name, "key set-up, a device asked in every phase", "ms", 1e3 * seconds)
    yield _row(name, "key set-up, up and down, mean of the devices", "kB", carried / 1e3)


def _device_seconds(took: Measured) -> float:
    return sum(phase.seconds for phase in took.phases.values())


def _row(
    case: str,
    metric: str,
    unit: str,
    ours: float,
    peer: float | None = None,
    peer_name: str | None = None,
    *,
    goal: float | None = None,
    times: int | None = None,
) -> Row:
    """Return a row where less is better; ``times`` sets the goal to so much less than the peer."""
    if peer is not None and times is not None:
        goal = peer / times
    return Row(
        case=case,
        metric=metric,
        unit=unit,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        ratio=None if peer is None else peer / ours,
        goal=goal,
        met=None if goal is None else ours <= goal,
    )


def _short(count: int) -> str:
    for size, letter in ((MILLION, "M"), (1000, "k")):
        if count % size == 0:
            return f"{count // size}{letter}"
    return str(count)


def run(parameters: Sequence[int], devices: Sequence[int], wanted: Sequence[str]) -> list[Row]:
    """Measure every case; progress, and why a case is left out, goes to standard error."""
    rows: list[Row] = []
    for count in parameters:
        _say(f"{_short(count)} parameters: peers")
        added = add_plainly(count)
        peer = ckks.measure(count, _rounds(10 * count)) if "he" in wanted else None
        for mode in wanted:
            for setting in SETTINGS[mode]:
                for size in devices:
                    rows += _case_rows(mode, setting, count, size, peer, added)
    return rows


def _case_rows(
    mode: str,
    setting: Setting,
    parameters: int,
    devices: int,
    peer: ckks.Costs | None,
    added: Added,
) -> list[Row]:
    what = f"{mode}, {_short(parameters)} parameters, {devices} devices, {setting}"
    try:
        case = case_of(mode, setting, parameters, devices)
    except BadParameters as error:
        _say(f"{what}: left out; {error}")
        return []
    _say(what)
    return list(rows_of(case, setting, measure(case), peer if mode == "he" else None, added))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.secure_sum", description="Measure private sums."
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument(
        "--parameters", type=_numbers, default=[10_000, 100_000, MILLION, 10 * MILLION]
    )
    parser.add_argument("--devices", type=_numbers, default=[GOAL_DEVICES, 100])
    parser.add_argument(
        "--modes", type=lambda text: text.split(","), default=["he", "secagg", "plain"]
    )
    options = parser.parse_args(arguments)
    wanted = []
    for mode in options.modes:
        if mode not in SETTINGS:
            parser.error(f"unknown mode {mode!r}; use one of {', '.join(SETTINGS)}")
        if mode in modes.MODES:
            wanted.append(mode)
        else:
            _say(f"{mode}: left out; there is no such mode in this version")
    return report(run(options.parameters, options.devices, wanted), options.json)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
