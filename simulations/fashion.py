"""The Fashion-MNIST task: which of ten kinds of clothing a grey image of 28 × 28 pixels shows.

H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", arXiv 1708.07747: 60,000 images to train on and 10,000 to test with, in the
format of MNIST. Debian has them as the package ``dataset-fashion-mnist``.

The network is the one of published tables of federated learning on these images (Li et al.,
arXiv 2102.02079, section V; Flower's baseline ``niid_bench``): two convolutions of 6 and 16
channels, 5 × 5, each with ReLU and a maximum of 2 × 2, then 120, 84 and 10 units. Pixels are
between 0 and 1 and not standardised, as there.
"""

import gzip
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import DataMissing
from atoll.federation.task import Examples, Split
from atoll.simulations.digits import read

if TYPE_CHECKING:
    from torch import nn

VARIABLE: Final = "ATOLL_FASHION_MNIST"
"""Environment variable that names the directory with the four files."""
DEBIAN: Final = Path("/usr/share/datasets/fashion-mnist")
SIDE: Final = 28
_PREFIX: Final[Mapping[Split, str]] = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES: Final = 8


class FashionMnist:
    """Ten kinds of clothing from grey images."""

    name = "fashion-mnist"
    input_shape: tuple[int, ...] = (1, SIDE, SIDE)
    channels: tuple[str, ...] = ("grey",)
    classes: tuple[str, ...] = (
        "T-shirt or top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )

    def model(self, seed: int) -> "nn.Module":
        """Return the network, initialised from ``seed`` as torch does it."""
        import torch
        from torch import nn

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(1, 6, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 16, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(16 * 4 * 4, 120),
                nn.ReLU(),
                nn.Linear(120, 84),
                nn.ReLU(),
                nn.Linear(84, len(self.classes)),
            )
        # The same numbers in another order in memory, in which a CPU convolves them faster.
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def load(self, data: Path, split: Split) -> Examples:
        """Read ``x`` and ``y`` from ``train.npz`` or ``test.npz``."""
        return read(data, split, self.name)


def place(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the files: what :data:`VARIABLE` says, or Debian's."""
    return Path(environment.get(VARIABLE) or DEBIAN)


def dataset(directory: Path, split: Split) -> Examples:
    """Return 60,000 or 10,000 images, ``(n, 1, 28, 28)`` in [0, 1].

    Raises :class:`DataMissing` when ``directory`` has no such files, or others of that name.
    """
    prefix = _PREFIX[split]
    try:
        x = idx((directory / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        y = idx((directory / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    except FileNotFoundError as error:
        raise DataMissing(
            f"there is no {error.filename}: apt-get install dataset-fashion-mnist, or set "
            f"{VARIABLE} to a directory that has the four .gz files of Fashion-MNIST"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataMissing(f"{directory} cannot be read as Fashion-MNIST: {error}") from error
    if x.shape != (len(y), SIDE, SIDE) or y.ndim != 1:
        raise DataMissing(f"{directory} holds images {x.shape} and labels {y.shape}")
    pixels = x[:, np.newaxis].astype(np.float32) / np.float32(255)
    return Examples(pixels, y.astype(np.int64))


def idx(packed: bytes) -> npt.NDArray[np.uint8]:
    """Return the array in a gzipped IDX file of unsigned bytes.

    Two zero bytes, the type (8), the number of axes, their lengths as big-endian 32-bit words,
    then the values, the last axis fastest (Y. LeCun, C. Cortes and C. Burges, "The MNIST database
    of handwritten digits"). Raises :class:`ValueError` or what :mod:`gzip` does for anything else.
    """
    data = gzip.decompress(packed)
    axes = data[3] if len(data) > 3 else 0
    begin = 4 + 4 * axes
    if data[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or len(data) < begin:
        raise ValueError("no IDX file of unsigned bytes")
    shape = np.frombuffer(data[4:begin], dtype=">u4").astype(np.int64)
    if len(data) - begin != int(np.prod(shape)):
        raise ValueError(f"{len(data) - begin} values where {shape.tolist()} are said to be")
    return np.frombuffer(data, dtype=np.uint8, offset=begin).reshape(shape)
