"""How fast a simulated cohort trains, beside pfl-research and Flower on Ray.

    python -m benchmarks.simulation [--json] [--devices 50] [--rounds 3] [--device cpu|cuda]

The setting in which pfl-research compares simulators on CIFAR-10 (Granqvist et al., arXiv
2404.06430), with its network of two convolutions: 50 devices a round with 50 examples each,
batches of 10, learning rate 0.1, one epoch. There arithmetic decides. So the same is done with a
network of one hidden layer over 64 values, where the cost of starting an operation outweighs the
operation, on as many devices and on ``--many``; for that no goal is set. Examples are random;
what they show changes no time.

Each side runs as a program of its own, the peers in environments of their own
(:mod:`benchmarks.peers.environments`): the least seconds of ``--rounds`` rounds after one that is
not counted (ten times as many where the network and the cohort are small), and the most memory
that the program and all it started took. Each may use all cores as it can, and its fastest way
counts: pfl with one thread, with a thread for each core, and with a process for each; Flower with
an actor for each core, and with one of as many threads. Before, one round without dropout is
compared, weight by weight: a step of each device on all of its examples, so that the order of
batches, which is each side's own, plays no part.

Ours are whole rounds: what it does to an update before it is summed, to clip and to round it,
is in them. On a GPU all leave dropout out, with which clients cannot be mapped.

Besides, training as one computation is compared with training device by device, which is also
what it is checked against: for a network of two larger convolutions, for a narrow one on images a
quarter as large, and for the one with a hidden layer. The goal, not to be slower, is for what
``atoll simulate`` would train together (:func:`atoll.federation.batched.worthwhile`).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from atoll.federation import batched, parameters, training
from atoll.federation.batched import Client
from atoll.federation.plan import Training
from atoll.federation.task import Examples
from atoll.federation.training import Trained
from atoll.simulations.workers import cores
from benchmarks.peers import environments
from benchmarks.peers.environments import FOLDER, PeerMissing
from benchmarks.peers.networks import CLASSES, NETWORKS, one_hidden
from benchmarks.rows import Row, report

DEVICES: Final = 50
MANY: Final = 1000
ROWS: Final = 50
SETTINGS: Final = Training(local_epochs=1, batch_size=10, learning_rate=0.1, momentum=0.0)
TOLERANCE: Final = 1e-5
HIDDEN: Final = "one hidden layer, 64 values"
NAMES: Final = {"pfl": "pfl-research 0.6", "flower-ray": "Flower 1.41 on Ray"}
SAME: Final = 2e-5
"""Most that a weight may differ after one step of all devices; ours are rounded to 1.2e-5."""

Setting = dict[str, object]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Whole rounds that every side runs, of a network in :mod:`benchmarks.peers.networks`."""

    name: str
    network: str
    shape: tuple[int, ...]
    devices: int
    timed: int
    dropout: float
    goals: Mapping[str, float]
    """Times a peer's rounds per second; none where there is no such goal."""


def cifar(devices: int, timed: int, dropout: float) -> Rounds:
    """Return pfl-research's own setting."""
    how = "" if dropout else ", no dropout"
    name = f"pfl-research's CIFAR-10 setting: {devices:,} devices{how}"
    goals = {"pfl": 2.0, "flower-ray": 20.0}
    return Rounds(name, "simple_cnn", (32, 32, 3), devices, timed, dropout, goals)


def hidden(devices: int, timed: int) -> Rounds:
    """Return the setting of a small network."""
    name = f"{HIDDEN}: {devices:,} devices, {ROWS} examples each"
    return Rounds(name, "one_hidden", (64,), devices, timed, 0.0, {})


@dataclass(frozen=True, slots=True)
class Case:
    """A network, and the shape of what it looks at."""

    name: str
    shape: tuple[int, ...]
    model: Callable[[], nn.Module]


def convolutional() -> nn.Module:
    """Return a network of two convolutions for 32 × 32 colour images."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 5 * 5, CLASSES),
    )


def narrow() -> nn.Module:
    """Return a network of two narrow convolutions for 16 × 16 colour images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, CLASSES),
    )


CASES: Final = (
    Case("two convolutions, CIFAR-10's shape", (3, 32, 32), convolutional),
    Case("two narrow convolutions, 16 × 16", (3, 16, 16), narrow),
    Case(HIDDEN, (64,), one_hidden),
)


def measure(case: Case, devices: int, repeats: int) -> Row:
    """Train the cohort both ways in turn and compare the least seconds."""
    torch.manual_seed(0)
    model, rng = case.model(), np.random.default_rng(0)
    weights = parameters.flatten(model)
    clients = [
        Client(
            Examples(
                rng.normal(size=(ROWS, *case.shape)).astype(np.float32),
                rng.integers(0, CLASSES, ROWS),
            ),
            seed,
        )
        for seed in range(devices)
    ]

    def together() -> list[Trained]:
        return list(batched.train(model, weights, clients, SETTINGS))

    def alone() -> list[Trained]:
        return [training.train(model, weights, c.examples, SETTINGS, c.seed) for c in clients]

    batched.check(model, case.shape, CLASSES, SETTINGS)  # and what torch imports at first use
    _same(together(), alone())
    ours, theirs = [], []
    for _ in range(repeats):  # in turn, so that both meet the same neighbours on the machine
        ours.append(_seconds(together))
        theirs.append(_seconds(alone))
    rate, peer = 1 / min(ours), 1 / min(theirs)
    wanted = batched.worthwhile(model, case.shape, SETTINGS, batched.default_device())
    return Row(
        case=f"{case.name}: {devices} devices, {ROWS} examples each, {len(weights):,} parameters",
        metric="local training of a cohort",
        unit="rounds/s",
        ours=rate,
        peer=peer,
        peer_name="device by device",
        ratio=rate / peer,
        goal=peer if wanted else None,
        met=rate >= peer if wanted else None,
    )


def compare(folder: Path, rounds: Rounds) -> list[Row]:
    """Run whole rounds of ours and of each peer; return speed and memory beside each."""
    _write(folder, rounds)
    setting: Setting = {
        "folder": str(folder),
        "network": rounds.network,
        "cohort": rounds.devices,
        "batch": SETTINGS.batch_size,
        "rate": SETTINGS.learning_rate,
    }
    timed = setting | {
        "dropout": rounds.dropout,
        "warm": 1,
        "rounds": rounds.timed,
        "result": None,
    }
    found: dict[str, tuple[str, dict[str, Any]] | PeerMissing] = {}
    ours(setting | _once(folder, "ours"), cores())
    best = ours(timed, cores())
    for peer, ways in (("pfl", pfl_ways()), ("flower-ray", flower_ways(rounds.devices))):
        try:
            _agree(folder, peer, setting, ways)
            tried = [(way, run(peer, timed)) for way, run in ways]
            found[peer] = min(tried, key=lambda one: min(one[1]["seconds"]))
        except PeerMissing as error:
            found[peer] = error
            print(f"{NAMES[peer]} is not measured: {error}", file=sys.stderr)
    again = ours(timed, cores())  # before and after the peers, for what else the machine does
    best = min(best, again, key=lambda one: min(one["seconds"]))
    return [row for peer in NAMES for row in _rows(rounds, peer, best, found[peer])]


def _rows(
    rounds: Rounds,
    peer: str,
    best: dict[str, Any],
    found: tuple[str, dict[str, Any]] | PeerMissing,
) -> list[Row]:
    """Return the rows of speed and of memory beside one peer; without it, one that says so."""
    case, rate = rounds.name, 1 / min(best["seconds"])
    if isinstance(found, PeerMissing):
        name = f"{NAMES[peer]}: not measured"
        return [Row(case=case, metric="rounds", unit="rounds/s", ours=rate, peer_name=name)]
    way, said = found
    theirs, held, own = 1 / min(said["seconds"]), said["peak_bytes"], best["peak_bytes"]
    goal = theirs * rounds.goals[peer] if peer in rounds.goals else None
    return [
        Row(
            case=case,
            metric="rounds",
            unit="rounds/s",
            ours=rate,
            peer=theirs,
            peer_name=f"{NAMES[peer]}, {way}",
            ratio=rate / theirs,
            goal=goal,
            met=None if goal is None else rate >= goal,
        ),
        Row(
            case=case,
            metric="peak memory",
            unit="MB",
            ours=own / 1e6,
            peer=held / 1e6,
            peer_name=f"{NAMES[peer]}, {way}",
            ratio=held / own,
        ),
    ]


def ours(setting: Setting, workers: int) -> dict[str, Any]:
    """Run Atoll's side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.simulated_rounds"]
    return environments.measured(command, setting | {"workers": workers})


Way = tuple[str, Callable[[str, Setting], dict[str, Any]]]


def pfl_ways() -> list[Way]:
    """Return how pfl can use the cores."""
    script, count = FOLDER / "pfl_rounds.py", cores()
    apart = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))

    def threads(number: int) -> Way:
        return (
            f"threads: {number}",
            lambda peer, given: environments.run(peer, script, given | {"threads": number}),
        )

    return [
        threads(1),
        threads(count),
        (
            f"processes: {count}",
            lambda peer, given: environments.run(
                peer, script, given | {"threads": 1}, launcher=apart
            ),
        ),
    ]


def flower_ways(devices: int) -> list[Way]:
    """Return how Flower on Ray can use the cores."""

    def way(actors: int, threads: int) -> Way:
        more = {"work": "train", "clients": devices, "actors": actors, "threads": threads}
        return (
            f"actors: {actors}, threads: {threads}",
            lambda peer, given: environments.run(peer, FOLDER / "flower_ray.py", given | more),
        )

    return [way(cores(), 1), way(1, cores())]


def _once(folder: Path, name: str) -> Setting:
    """Return what is asked of one round whose result is looked at; pfl needs one to warm up."""
    result = str(folder / f"{name}.npy")
    return {"batch": ROWS, "dropout": 0.0, "warm": 1, "rounds": 0, "result": result}


def _agree(folder: Path, peer: str, setting: Setting, ways: Sequence[Way]) -> None:
    """Check that a peer's round does the work that ours does."""
    ways[0][1](peer, setting | _once(folder, peer))
    start, mine, theirs = (np.load(folder / f"{name}.npy") for name in ("weights", "ours", peer))
    assert np.abs(mine - theirs).max() < SAME < np.abs(mine - start).max() / 10, peer


def _write(folder: Path, rounds: Rounds) -> None:
    """Write examples and first weights for all sides; the weights are Glorot's, as pfl has them."""
    rng = np.random.default_rng(0)
    shape = (rounds.devices, ROWS)
    np.save(folder / "x.npy", rng.normal(size=(*shape, *rounds.shape)).astype(np.float32))
    np.save(folder / "y.npy", rng.integers(0, CLASSES, shape))
    torch.manual_seed(0)
    net = NETWORKS[rounds.network](0.0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    np.save(folder / "weights.npy", parameters.flatten(net))


def _same(together: Sequence[Trained], alone: Sequence[Trained]) -> None:
    """Check that both did the same work.

    By the median device: at a kink (which of two pixels is the largest) the last bit of a
    float32 may send a device either way, and with this learning rate it then goes on elsewhere.
    """
    apart = [
        float(np.abs(mine.weights - own.weights).max())
        for mine, own in zip(together, alone, strict=True)
    ]
    assert np.median(apart) < TOLERANCE, apart


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _device() -> str:
    return batched.default_device().type


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--threads", type=int, default=1, help="of torch, together and alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="timed, of ours and of each peer")
    parser.add_argument("--many", type=int, default=MANY, help="devices of the small network")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=_device())
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for each side's program
    before = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        rows = [measure(case, given.devices, given.repeats) for case in CASES]
    finally:
        torch.set_num_threads(before)
    if not given.alone:
        for rounds in (
            cifar(given.devices, given.rounds, float(given.device == "cpu")),
            hidden(given.devices, 10 * given.rounds),
            hidden(given.many, given.rounds),
        ):
            with tempfile.TemporaryDirectory() as folder:
                rows += compare(Path(folder), rounds)
    return report(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
