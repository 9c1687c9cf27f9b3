"""A task that a linear model solves: two clouds of points, a little different per device."""

import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atoll.federation.errors import DataMissing
from atoll.federation.task import Examples, Split

NAME = "blobs"


class Blobs:
    """Points in the plane, one cloud per class."""

    name = NAME
    input_shape = (2,)
    channels = ("x", "y")
    classes = ("left", "right")
    _loads = 0

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def load(self, data: Path, split: Split) -> Examples:
        if not (data / "seed").exists():
            raise DataMissing(f"no examples in {data}")
        self._loads += 1
        if (data / "stall-after").exists() and self._loads > int(
            (data / "stall-after").read_text()
        ):
            (data / "stalled").touch()
            threading.Event().wait(120)
        rng = np.random.default_rng([int((data / "seed").read_text()), split == "test"])
        y = np.arange(60, dtype=np.int64) % 2
        centre = np.where(y[:, None] == 1, 1.5, -1.5) * np.array([1.0, 0.5])
        return Examples((centre + rng.normal(size=(60, 2))).astype(np.float32), y)


def write(directory: Path, seed: int) -> Path:
    """Give a device its examples and return its data directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "seed").write_text(str(seed))
    return directory
