"""The networks that Atoll and its peers train; peers import this file from beside their own.

    NETWORKS["simple_cnn"](dropout) -> an untrained network

``dropout`` 1 has the network's own, 0 none, so that results can be compared and clients mapped.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

CLASSES = 10


class Transpose2D(nn.Module):
    """Take channels from the end to the front."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a view."""
        return x.permute(0, 3, 1, 2)


def simple_cnn(dropout: float) -> nn.Module:
    """Return the ``simple_cnn`` of pfl-research, for 32 × 32 images with three channels last."""
    return nn.Sequential(
        Transpose2D(),
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _dropout(0.25 * dropout),
        nn.Flatten(),
        nn.Linear(14 * 14 * 64, 128),
        nn.ReLU(),
        _dropout(0.5 * dropout),
        nn.Linear(128, CLASSES),
    )


def one_hidden(_: float = 0.0) -> nn.Module:
    """Return a network with one hidden layer for 64 values, which has no dropout."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


NETWORKS: Mapping[str, Callable[[float], nn.Module]] = {
    "simple_cnn": simple_cnn,
    "one_hidden": one_hidden,
}


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share else nn.Identity()
