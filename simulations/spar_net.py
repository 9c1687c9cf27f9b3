"""The small convolutional network that the SPAR task trains."""

from typing import Final

import torch
from torch import nn
from torch.nn import functional

SCALE: Final = (1.0, 1.0, 1.0, 0.5, 0.5, 0.5)
"""Physical constants, not statistics: 1 / (1 g) and 1 / (2 rad/s)."""
TILT: Final = 0.2
VIGOUR: Final = 0.1


class Worn(nn.Module):
    """In training, wears the watch a little differently in every window; otherwise nothing.

    A random rotation of about :data:`TILT` radians (accelerometer and gyroscope alike) and a
    random vigour of about :data:`VIGOUR` around 1. It runs where the data is, in the model's
    training mode, and is no part of the exported model.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, 6, t)`` to the same shape."""
        if not self.training:
            return x
        n, _, t = x.shape
        turn = torch.matrix_exp(_skew(torch.randn(n, 3) * TILT))
        vigour = 1 + VIGOUR * torch.randn(n, 1, 1)
        turned = torch.einsum("nij,nsjt->nsit", turn, x.reshape(n, 2, 3, t))
        return turned.reshape(n, 6, t) * vigour


def _skew(axis: torch.Tensor) -> torch.Tensor:
    """Return the cross-product matrices ``(n, 3, 3)`` of ``(n, 3)`` rotation vectors."""
    a, b, c = axis.unbind(1)
    zero = torch.zeros_like(a)
    rows = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero], dim=1)
    return rows.reshape(-1, 3, 3)


class StandardisedConv(nn.Conv1d):
    """A convolution whose filters have mean 0 and a norm that is learnt.

    Qiao et al., arXiv 1903.10520, with the gain of Brock et al., arXiv 2101.08692, §4. It
    trains as readily as with normalised activations and needs no statistics of the data;
    averaging devices' weights cannot shrink its filters. In the exported model it is a plain
    convolution.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__(inputs, outputs, width, stride=2, padding=width // 2)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1), 1.7))  # √(2/(1-1/π)), for ReLU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, inputs, t)`` to ``(n, outputs, t / 2)``."""
        centred = self.weight - self.weight.mean(dim=(1, 2), keepdim=True)
        norm = centred.square().sum(dim=(1, 2), keepdim=True)
        weight = centred * torch.rsqrt(norm + 1e-4) * self.gain
        return functional.conv1d(x, weight, self.bias, self.stride, self.padding)


class SparNet(nn.Module):
    """Three strided convolutions; their mean and their maximum over time; a linear layer.

    No normalisation of activations: its statistics would tell of the data, average badly
    between people, and stay in float when the rest becomes int8.
    """

    scale: torch.Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 6, 1), persistent=False)
        self.worn = Worn()
        self.body = nn.Sequential(
            StandardisedConv(6, 32, 9),
            nn.ReLU(),
            StandardisedConv(32, 48, 5),
            nn.ReLU(),
            StandardisedConv(48, 64, 5),
            nn.ReLU(),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(n, 6, 200)`` in g and rad/s to logits ``(n, classes)``."""
        seen: torch.Tensor = self.body(self.worn(x * self.scale))
        logits: torch.Tensor = self.head(torch.cat([seen.mean(dim=2), seen.amax(dim=2)], dim=1))
        return logits


def build(classes: int, seed: int) -> SparNet:
    """Return the network with weights from ``seed`` (He et al. 2015).

    Torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SparNet(classes)
        for layer in net.modules():
            if isinstance(layer, nn.Conv1d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return net
