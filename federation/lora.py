"""Low-rank adapters: a layer's weight W stays, and W + α/r·B·A is what it computes with.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). B begins at
zero, so an adapted model begins as the plain one; A as in the authors' code, uniform within
1/√(inputs). A convolution's weight counts as the matrix ``(outputs, the rest)``: A is a
convolution of its own shape to r channels, B one of a single point.

An adapter is made of layers like any other, so that DP-SGD's rules for layers hold for it.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from atoll.federation.errors import BadPlan

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
KINDS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Adapted(nn.Module):
    """A layer with its adapter: ``base``, ``down`` (A) and ``up`` (B)."""

    def __init__(self, base: Layer, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = _pair(base, rank)
        self._scale = alpha / rank
        within = 1 / math.sqrt(base.weight[0].numel())
        nn.init.uniform_(self.down.weight, -within, within)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` with the weight of :meth:`merged`."""
        adapted: Tensor = self.base(x) + self._scale * self.up(self.down(x))
        return adapted

    def merged(self) -> Tensor:
        """Return W + α/r·B·A, of the shape of W."""
        weight = self.base.weight.detach()
        product = self.up.weight.detach().flatten(1) @ self.down.weight.detach().flatten(1)
        return weight + self._scale * product.view_as(weight)


def adapt(model: nn.Module, layers: Iterable[str], rank: int, alpha: float, seed: int) -> None:
    """Give ``layers`` of ``model`` adapters, in place; the same ``seed`` gives the same ones.

    Raises :class:`BadPlan` for a rank that is no lower than the layer's own, for a convolution in
    groups, and for a model that is a single layer.
    """
    # Not the seed itself: with that the task has drawn its weights, and A would be some of them.
    digest = hashlib.sha256(f"atoll/lora/{seed}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        for name in layers:
            layer = model.get_submodule(name)
            if not name or not isinstance(layer, KINDS) or getattr(layer, "groups", 1) != 1:
                raise BadPlan(
                    f"layers.lora_layers: layer {name!r} cannot have an adapter; name a linear "
                    "layer in it, or a convolution without groups"
                )
            full = min(layer.weight.shape[0], layer.weight[0].numel())
            if rank >= full:
                raise BadPlan(
                    f"layers.lora_rank = {rank} is not below the rank of layer {name!r}, {full}: "
                    "lower it, or name the layer in layers.trained"
                )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(layer, rank, alpha))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return what each entry of the state dict is called in the plain model, adapters left out."""
    names = {name: name for name in model.state_dict()}
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            for entry in layer.state_dict():
                plain = entry.removeprefix("base.")
                if plain == entry:
                    del names[f"{name}.{entry}"]
                else:
                    names[f"{name}.{entry}"] = f"{name}.{plain}"
    return names


def merged(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model that computes what the adapted one does."""
    state = model.state_dict()
    found = {plain: state[name] for name, plain in plain_names(model).items()}
    for name, layer in model.named_modules():
        if isinstance(layer, Adapted):
            found[f"{name}.weight"] = layer.merged()
    return found


def _pair(base: Layer, rank: int) -> tuple[Layer, Layer]:
    """Return A and B for a layer."""
    if isinstance(base, nn.Linear):
        return (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
    kind = nn.Conv1d if isinstance(base, nn.Conv1d) else nn.Conv2d
    down = kind(
        base.in_channels,
        rank,
        base.kernel_size,  # type: ignore[arg-type]  # as many axes as the layer has
        base.stride,  # type: ignore[arg-type]
        base.padding,  # type: ignore[arg-type]
        base.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=base.padding_mode,
    )
    return down, kind(rank, base.out_channels, 1, bias=False)
