"""The digits task: handwritten digits of eight by eight pixels, small enough to train in seconds.

1,797 images in 17 levels of grey, from 43 people, whose names are not told (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998). They ship with scikit-learn; only its data
file is read, its code is never imported.

:func:`deal` gives each simulated device its share, and keeps some back to test with.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from atoll.federation.errors import DataMissing
from atoll.federation.task import Examples, Split

if TYPE_CHECKING:
    from torch import nn

SIDE: Final = 8
GREYS: Final = 16.0
TESTED: Final = 397
"""Images that no device gets."""
HIDDEN: Final = 32
FILE: Final = "digits.npz"


def dataset() -> Examples:
    """Return all images, ``(1797, 1, 8, 8)`` in [0, 1]; raise :class:`DataMissing` without them."""
    found = importlib.util.find_spec("sklearn")
    origin = Path(found.origin) if found is not None and found.origin else None
    path = origin.parent / "datasets" / "data" / "digits.csv.gz" if origin else None
    if path is None or not path.is_file():
        raise DataMissing("the digits are missing; pip install scikit-learn")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    pixels = table[:, :-1].reshape(-1, 1, SIDE, SIDE) / GREYS
    return Examples(pixels.astype(np.float32), table[:, -1].astype(np.int64))


def deal(out: Path, devices: int, evenness: float, seed: int) -> tuple[list[Path], Examples]:
    """Deal the images out to directories below ``out``; return these and what was kept back.

    Each class is shared out by a draw from a Dirichlet distribution with all parameters
    ``evenness`` (Hsu, Qi and Brown, arXiv 1909.06335): at 100 devices resemble each other, at
    0.1 most classes are on a few of them. Every device gets one image at least.
    """
    rng = np.random.default_rng(seed)
    images = dataset()
    order = rng.permutation(len(images.y))
    kept, rest = order[:TESTED], order[TESTED:]
    held: list[list[int]] = [[int(rest[device])] for device in range(devices)]
    rest = rest[devices:]
    for digit in range(10):
        mine = rest[images.y[rest] == digit]
        ends = np.cumsum(rng.dirichlet(np.full(devices, evenness))) * len(mine)
        for device, part in enumerate(np.split(mine, ends[:-1].astype(int))):
            held[device] += part.tolist()
    directories = []
    for device, dealt in enumerate(held):
        rows = rng.permutation(dealt)
        directory = out / f"device-{device:02d}"
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(directory / FILE, x=images.x[rows], y=images.y[rows])
        directories.append(directory)
    return directories, Examples(images.x[kept], images.y[kept])


class Digits:
    """Ten digits from 64 pixels."""

    name = "digits"
    input_shape: tuple[int, ...] = (1, SIDE, SIDE)
    channels: tuple[str, ...] = ("grey",)
    classes: tuple[str, ...] = tuple("0123456789")

    def model(self, seed: int) -> "nn.Module":
        """Return a network with one hidden layer, initialised from ``seed``."""
        import torch
        from torch import nn

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(SIDE * SIDE, HIDDEN),
                nn.ReLU(),
                nn.Linear(HIDDEN, len(self.classes)),
            )

    def load(self, data: Path, split: Split) -> Examples:
        """Read what :func:`deal` wrote; a device holds nothing back, so it tests on nothing."""
        try:
            with np.load(data / FILE, allow_pickle=False) as held:
                dealt = Examples(held["x"], held["y"])
        except (OSError, ValueError, KeyError) as error:
            raise DataMissing(f"no digits in {data}: {error}") from error
        return dealt if split == "train" else Examples(dealt.x[:0], dealt.y[:0])
