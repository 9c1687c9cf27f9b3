"""A model's weights as one float32 vector, and back.

The vector holds every floating-point entry of the state dict in its order: parameters and
running statistics alike. Integer entries (a batch counter) stay on each side.
"""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from atoll.federation.errors import BadMessage
from atoll.federation.plan import Number

if TYPE_CHECKING:
    from torch import nn

Vector = npt.NDArray[np.float32]


def flatten(model: "nn.Module") -> Vector:
    """Return a copy of the weights, float32 of shape ``(n,)``."""
    parts = [
        value.detach().cpu().numpy().astype(np.float32, copy=False).ravel()
        for value in model.state_dict().values()
        if value.is_floating_point()
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unflatten(model: "nn.Module", vector: Vector) -> None:
    """Load ``vector``; raise :class:`BadMessage` when its length is not the model's."""
    import torch

    state = model.state_dict()
    wanted = sum(value.numel() for value in state.values() if value.is_floating_point())
    if vector.shape != (wanted,):
        raise BadMessage(f"weights of shape {vector.shape} do not fit a model of {wanted} values")
    at = 0
    with torch.no_grad():
        for value in state.values():
            if value.is_floating_point():
                piece = np.array(vector[at : at + value.numel()], dtype=np.float32)
                value.copy_(torch.from_numpy(piece).reshape(value.shape))
                at += value.numel()


def trained(model: "nn.Module") -> dict[str, slice]:
    """Return where each parameter that is trained lies in the vector."""
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    places, at = {}, 0
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            if name in wanted:
                places[name] = slice(at, at + value.numel())
            at += value.numel()
    return places


def mask(model: "nn.Module") -> npt.NDArray[np.bool_]:
    """Return which values of the vector are trained, ``(n,)``; running statistics are not."""
    found = np.zeros(len(flatten(model)), np.bool_)
    for place in trained(model).values():
        found[place] = True
    return found


def to_bytes(vector: Vector, number: Number = "float32") -> bytes:
    """Return little-endian bytes of numbers of that kind; what is too large for it is infinite."""
    with np.errstate(over="ignore"):
        return vector.astype(_DTYPES[number], copy=False).tobytes()


def downlink(vector: Vector, asked: Number) -> tuple[bytes, Number]:
    """Return weights as they go to devices, and the numbers that the bytes are.

    They are ``asked``, but float32 where a weight is not finite in it: float16 ends at 65,504.
    """
    narrow = to_bytes(vector, asked)
    if asked != "float32" and not np.isfinite(from_bytes(narrow, asked)).all():
        return to_bytes(vector), "float32"
    return narrow, asked


def from_bytes(data: bytes, number: Number = "float32") -> Vector:
    """Return a writable float32 vector; raise :class:`BadMessage` for a torn one."""
    dtype = _DTYPES[number]
    if len(data) % dtype.itemsize:
        raise BadMessage(f"{len(data)} bytes are no {number} vector")
    return np.frombuffer(data, dtype=dtype).astype(np.float32)


_DTYPES: Final[dict[Number, "np.dtype[Any]"]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
}
