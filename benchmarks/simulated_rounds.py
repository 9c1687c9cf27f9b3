"""Atoll's side of a simulation: whole rounds, as ``atoll simulate`` has them.

Arguments as JSON, like those of :mod:`benchmarks.peers.pfl_rounds`: ``network``, ``dropout``,
``folder``, ``cohort``, ``batch``, ``rate``, ``warm``, ``rounds``, ``workers`` and ``result``.
Prints the ``seconds`` of each timed round, and the ``engine`` that trained.

A round clips, weighs and rounds each update to integers and adds these, which the peers do not;
the clipping norm is one that no update reaches.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from atoll.federation.errors import DataMissing
from atoll.federation.plan import Cohort, Plan, Privacy, Training
from atoll.federation.task import Examples, Split
from atoll.simulations import simulate
from atoll.simulations.populations import Simulated
from benchmarks.peers.networks import CLASSES, NETWORKS

CLIP: Final = 100.0
BITS: Final = 24
_TESTED: Final = 2


@dataclass(frozen=True)
class Classifying:
    """The task: a network that begins with given weights."""

    weights: npt.NDArray[np.float32]
    network: str
    dropout: float
    input_shape: tuple[int, ...]
    name: str = "given"
    classes: tuple[str, ...] = tuple(str(i) for i in range(CLASSES))

    @property
    def channels(self) -> tuple[str, ...]:
        """Names along the first axis of an example."""
        return tuple(str(i) for i in range(self.input_shape[0]))

    def model(self, seed: int) -> nn.Module:  # noqa: ARG002 -- the weights are given
        """Return the network with its first weights."""
        net = NETWORKS[self.network](self.dropout)
        nn.utils.vector_to_parameters(torch.from_numpy(self.weights), net.parameters())
        return net

    def load(self, data: Path, split: Split) -> Examples:  # noqa: ARG002
        """Refuse: devices are simulated."""
        raise DataMissing("this task has no data on devices")


@dataclass(frozen=True)
class Users:
    """The population: float32 ``(users, rows, *input_shape)`` and int64 ``(users, rows)``."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.y)

    def examples(self, device: int, split: Split) -> Examples:
        """Return all of a user's rows to train on, and a few to be done with evaluating."""
        rows = slice(None) if split == "train" else slice(_TESTED)
        return Examples(self.x[device][rows], self.y[device][rows])


def main(given: dict[str, Any]) -> dict[str, Any]:
    """Run the rounds."""
    folder = Path(given["folder"])
    x, y, weights = (np.load(folder / f"{name}.npy") for name in ("x", "y", "weights"))
    task = Classifying(weights, given["network"], given["dropout"], x.shape[2:])
    plan = Plan(
        name="given",
        task="given",
        model="given",
        rounds=given["warm"] + given["rounds"],
        training=Training(
            local_epochs=1,
            batch_size=given["batch"],
            learning_rate=given["rate"],
            momentum=0.0,
        ),
        cohort=Cohort(min_devices=given["cohort"]),
        privacy=Privacy(mode="plain", noise_multiplier=0.0, clip_norm=CLIP, bits=BITS),
    )
    heard: list[simulate.Round] = []
    ended = simulate.run(
        plan,
        Simulated(task, Users(x, y)),
        given["cohort"],
        heard.append,
        every=plan.rounds + 1,
        workers=given["workers"],
    )
    if given["result"]:
        np.save(given["result"], ended.weights)
    seconds = [done.seconds for done in heard[given["warm"] :]]
    return {"seconds": seconds, "engine": ended.engine}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
