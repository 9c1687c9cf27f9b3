"""How fast a cohort trains in a simulation: as one computation, and one device after the other.

    python -m benchmarks.simulation [--json] [--devices 50] [--threads 1] [--repeats 3]

One round's local training of 50 devices with 50 examples each, batches of 10, learning rate
0.1, one epoch: the setting in which pfl-research compares simulators on CIFAR-10 (Granqvist et
al., arXiv 2404.06430). Images are random, of CIFAR-10's shape; what they show changes no
time. Besides a network of two convolutions of the size used there, a narrow one on images a
quarter as large, and one with a hidden layer over 64 values: in these the cost of starting an
operation outweighs the operation. The goal, not to be slower, is for what ``atoll simulate`` would
train together (:func:`atoll.federation.batched.worthwhile`).

The peer in the same run is :func:`atoll.federation.training.train`, device by device, which is
also what the batched result is checked against. Other simulators are not measured: a line
on standard error says which are not installed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

import numpy as np
import torch
from torch import nn

from atoll.federation import batched, parameters, training
from atoll.federation.batched import Client
from atoll.federation.plan import Training
from atoll.federation.task import Examples
from atoll.federation.training import Trained
from benchmarks.rows import Row, report

DEVICES: Final = 50
ROWS: Final = 50
CLASSES: Final = 10
SETTINGS: Final = Training(local_epochs=1, batch_size=10, learning_rate=0.1, momentum=0.0)
TOLERANCE: Final = 1e-5
OTHERS: Final = {"pfl": "pfl-research", "ray": "Flower on Ray"}


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


def small() -> nn.Module:
    """Return a network with one hidden layer for 64 values."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


CASES: Final = (
    Case("two convolutions, CIFAR-10's shape", (3, 32, 32), convolutional),
    Case("two narrow convolutions, 16 × 16", (3, 16, 16), narrow),
    Case("one hidden layer, 64 values", (64,), small),
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--devices", type=int, default=DEVICES)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    for module, name in OTHERS.items():
        why = "not measured here" if find_spec(module) else "not installed"
        print(f"{name}: left out; {why}", file=sys.stderr)
    before = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        rows = [measure(case, given.devices, given.repeats) for case in CASES]
    finally:
        torch.set_num_threads(before)
    return report(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
