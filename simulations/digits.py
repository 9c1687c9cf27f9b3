"""The digits task: which digit an image of 8 × 8 pixels shows.

1,797 handwritten digits that come with scikit-learn: E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits", UCI Machine Learning Repository (1998), its test part. Small
enough that what a simulation costs is the federation and not the data.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from atoll.federation.errors import DataMissing
from atoll.federation.task import Examples, Split

if TYPE_CHECKING:
    from torch import nn

SIDE: Final = 8
HIDDEN: Final = 64
_BRIGHTEST: Final = 16.0
_EVERY: Final = 5
"""One image in so many is held back for testing."""


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
        path = data / f"{split}.npz"
        try:
            with np.load(path, allow_pickle=False) as held:
                return Examples(held["x"].astype(np.float32), held["y"].astype(np.int64))
        except (OSError, ValueError, KeyError) as error:
            raise DataMissing(f"{path} cannot be read as digits: {error}") from error


def pools() -> tuple[Examples, Examples]:
    """Return the images for training and those for testing: x in [0, 1].

    Raises :class:`DataMissing` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataMissing("the digits come with scikit-learn; pip install 'atoll[sim]'") from None
    x, y = load_digits(return_X_y=True)
    images = (x / _BRIGHTEST).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    held_back = np.arange(len(y)) % _EVERY == 0
    return (
        Examples(images[~held_back], y[~held_back].astype(np.int64)),
        Examples(images[held_back], y[held_back].astype(np.int64)),
    )
