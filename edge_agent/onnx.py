"""ONNX Runtime: the one file that imports it."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime

from atoll.edge_agent.errors import BadModel
from atoll.edge_agent.runtime import Port, Tensor

_DTYPES: Final = {
    "tensor(bool)": np.bool_,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}


class Onnx:
    """A model in ONNX Runtime on the CPU; its session takes calls from several threads."""

    platform = "onnxruntime_onnx"

    def __init__(self, model: bytes, threads: int = 1) -> None:
        """Load a model; raise :class:`BadModel`.

        ``threads`` are those one call may use. Spinning is off: a thread that waits busily
        for the next request would cost a small device its battery.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.enable_cpu_mem_arena = False  # keeps the peak of a large batch for ever
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            self.inputs: Sequence[Port] = [_port(arg) for arg in self._session.get_inputs()]
            self.outputs: Sequence[Port] = [_port(arg) for arg in self._session.get_outputs()]
        except _ERRORS as error:
            raise BadModel(f"ONNX Runtime cannot load the model: {error}") from error

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute; see :class:`atoll.edge_agent.runtime.Runtime`."""
        try:
            values = self._session.run(None, dict(feeds))
        except _ERRORS as error:
            raise BadModel(f"ONNX Runtime failed: {error}") from error
        return dict(zip((port.name for port in self.outputs), values, strict=True))


# ONNX Runtime's exceptions share no base of their own; these are all that its CPU sessions raise.
_CAPI: Final = onnxruntime.capi.onnxruntime_pybind11_state
_ERRORS: Final = (
    _CAPI.Fail,
    _CAPI.InvalidArgument,
    _CAPI.InvalidGraph,
    _CAPI.InvalidProtobuf,
    _CAPI.NoSuchFile,
    _CAPI.NotImplemented,
    _CAPI.RuntimeException,
    RuntimeError,
    ValueError,
    KeyError,
)


def _port(arg: Any) -> Port:  # noqa: ANN401  # onnxruntime ships no types
    shape = tuple(size if isinstance(size, int) else None for size in arg.shape)
    return Port(str(arg.name), shape, np.dtype(_DTYPES[arg.type]))
