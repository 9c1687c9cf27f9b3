"""What the agent asks of an inference engine, whichever it is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Tensor = npt.NDArray[Any]


class Port(NamedTuple):
    """One input or output: ``shape`` with ``None`` where any length goes."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


class Runtime(Protocol):
    """A loaded model; calls may come from several threads at once."""

    platform: str
    """Its name in the Open Inference Protocol's model metadata."""
    inputs: Sequence[Port]
    outputs: Sequence[Port]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute all outputs from all inputs, each of its port's dtype and shape.

        Raises :class:`atoll.edge_agent.errors.BadModel` when the engine fails.
        """
        ...


def load(path: Path, threads: int = 1) -> Runtime:
    """Load a model file by its ending; raise :class:`BadModel` when it cannot be.

    Engines are imported here, so that a device needs only the one its models use.
    """
    if path.suffix == ".tflite":
        from atoll.edge_agent.litert import LiteRt

        return LiteRt(path, threads)
    from atoll.edge_agent.onnx import Onnx

    return Onnx(path.read_bytes(), threads)
