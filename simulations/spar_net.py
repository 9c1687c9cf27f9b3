"""The small convolutional network that the SPAR task trains."""

from typing import Final

import torch
from torch import nn

SCALE: Final = (1.0, 1.0, 1.0, 0.5, 0.5, 0.5)
"""Physical constants, not statistics: 1 / (1 g) and 1 / (2 rad/s)."""


class Worn(nn.Module):
    """In training, wears the watch a little differently in every window; otherwise nothing.

    A random rotation of up to about ``tilt`` radians (accelerometer and gyroscope alike) and
    a random vigour of ``vigour`` around 1. It runs where the data is, in the model's training mode.
    """

    def __init__(self, tilt: float, vigour: float) -> None:
        super().__init__()
        self.tilt, self.vigour = tilt, vigour

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        n = len(x)
        turn = torch.matrix_exp(_skew(torch.randn(n, 3, device=x.device) * self.tilt))
        vigour = 1 + self.vigour * torch.randn(n, 1, 1, device=x.device)
        turned = torch.einsum("nij,nsjt->nsit", turn, x.unflatten(1, (2, 3)))
        return turned.flatten(1, 2) * vigour


def _skew(axis: torch.Tensor) -> torch.Tensor:
    """Return the cross-product matrices ``(n, 3, 3)`` of ``(n, 3)`` rotation vectors."""
    a, b, c = axis.unbind(1)
    zero = torch.zeros_like(a)
    return torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], dim=1).unflatten(1, (3, 3))


class SparNet(nn.Module):
    """Three strided convolutions and a mean over time.

    No normalisation layers: they hold statistics of the data, average badly between people,
    and stay in float when the rest becomes int8.
    """

    scale: torch.Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 6, 1), persistent=False)
        self.worn = Worn(tilt=0.2, vigour=0.1)
        self.body = nn.Sequential(
            nn.Conv1d(6, 32, 9, stride=2, padding=4),
            nn.ReLU(),
            nn.Conv1d(32, 48, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(48, 64, 5, stride=2, padding=2),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, 6, 200)`` in g and rad/s to logits ``(n, classes)``."""
        held: torch.Tensor = self.body(self.worn(x * self.scale))
        logits: torch.Tensor = self.head(held.mean(dim=2))
        return logits


def initialised(net: SparNet, seed: int) -> SparNet:
    """Fill the weights from ``seed`` (He et al. 2015), without touching torch's global state."""
    source = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=source)
            nn.init.zeros_(layer.bias if layer.bias is not None else torch.empty(0))
    return net
