"""The digits task: which digit an image of 8 × 8 pixels shows.

1,797 handwritten digits in 17 levels of grey (E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998, its test part). They come with
scikit-learn, of which only the data file is read. Small enough that what a simulation costs is
the federation and not the data.

:func:`pools` is for populations that are drawn on demand, :func:`deal` for devices with
directories of their own.
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
HIDDEN: Final = 64
TESTED: Final = 397
"""Images that :func:`deal` gives to no device."""
_BRIGHTEST: Final = 16.0
_EVERY: Final = 5
"""One image in so many is held back from pools."""


class Digits:
    """Ten digits from grey images."""

    name = "digits"
    input_shape: tuple[int, ...] = (1, SIDE, SIDE)
    channels: tuple[str, ...] = ("ink",)
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
        """Read ``x`` and ``y`` from ``train.npz`` or ``test.npz``."""
        return read(data, split, self.name)


def read(data: Path, split: Split, task: str) -> Examples:
    """Read ``x`` and ``y`` from ``train.npz`` or ``test.npz``; :class:`DataMissing` without."""
    path = data / f"{split}.npz"
    try:
        with np.load(path, allow_pickle=False) as held:
            return Examples(held["x"].astype(np.float32), held["y"].astype(np.int64))
    except (OSError, ValueError, KeyError) as error:
        raise DataMissing(f"{path} cannot be read as {task}: {error}") from error


def dataset() -> Examples:
    """Return all images, ``(1797, 1, 8, 8)`` in [0, 1]; raise :class:`DataMissing` without them."""
    found = importlib.util.find_spec("sklearn")
    origin = Path(found.origin) if found is not None and found.origin else None
    path = origin.parent / "datasets" / "data" / "digits.csv.gz" if origin else None
    if path is None or not path.is_file():
        raise DataMissing("the digits come with scikit-learn; pip install 'atoll[sim]'")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    pixels = table[:, :-1].reshape(-1, 1, SIDE, SIDE) / _BRIGHTEST
    return Examples(pixels.astype(np.float32), table[:, -1].astype(np.int64))


def pools() -> tuple[Examples, Examples]:
    """Return the images for training and those for testing."""
    images = dataset()
    held_back = np.arange(len(images.y)) % _EVERY == 0
    return (
        Examples(images.x[~held_back], images.y[~held_back]),
        Examples(images.x[held_back], images.y[held_back]),
    )


def deal(out: Path, devices: int, evenness: float, seed: int) -> tuple[list[Path], Examples]:
    """Deal the images out to directories below ``out``; return these and what was kept back.

    Each class is shared out by a draw from a Dirichlet distribution with all parameters
    ``evenness`` (Hsu, Qi and Brown, arXiv 1909.06335): at 100 devices resemble each other, at
    0.1 most classes are on a few of them. Every device gets one image at least, and none to test
    with.
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
        np.savez(directory / "train.npz", x=images.x[rows], y=images.y[rows])
        np.savez(directory / "test.npz", x=images.x[:0], y=images.y[:0])
        directories.append(directory)
    return directories, Examples(images.x[kept], images.y[kept])
