"""LiteRT through ``ai-edge-litert``: the one file that imports it."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from atoll.edge_agent.errors import BadModel
from atoll.edge_agent.runtime import Port, Tensor


class LiteRt:
    """A ``.tflite`` model; an interpreter has one set of buffers, so calls take turns."""

    platform = "litert_tflite"

    def __init__(self, model: Path | bytes, threads: int = 1) -> None:
        """Load a model; raise :class:`BadModel`."""
        try:
            content = model.read_bytes() if isinstance(model, Path) else model
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BadModel(f"LiteRT cannot load the model: {error}") from error
        self._lock = threading.Lock()
        self._in = self._interpreter.get_input_details()
        self._out = self._interpreter.get_output_details()
        self.inputs: Sequence[Port] = [_port(detail) for detail in self._in]
        self.outputs: Sequence[Port] = [_port(detail) for detail in self._out]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute; see :class:`atoll.edge_agent.runtime.Runtime`."""
        with self._lock:
            try:
                resized = False
                for detail in self._in:
                    index, shape = detail["index"], feeds[detail["name"]].shape
                    if tuple(self._interpreter.get_input_details()[0]["shape"]) != shape:
                        self._interpreter.resize_tensor_input(index, shape, strict=True)
                        resized = True
                if resized:
                    self._interpreter.allocate_tensors()
                for detail in self._in:
                    self._interpreter.set_tensor(detail["index"], feeds[detail["name"]])
                self._interpreter.invoke()
                return {
                    detail["name"]: np.array(self._interpreter.get_tensor(detail["index"]))
                    for detail in self._out
                }
            except (ValueError, RuntimeError, KeyError) as error:
                raise BadModel(f"LiteRT failed: {error}") from error


def _port(detail: Mapping[str, Any]) -> Port:
    shape = tuple(int(size) if size >= 0 else None for size in detail["shape_signature"])
    return Port(str(detail["name"]), shape, np.dtype(detail["dtype"]))
