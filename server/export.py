"""From trained weights to the file that devices run: ONNX, float and then int8.

The hub has no data, so calibration is split in two: devices run :func:`augment`'s model and
report histograms of every tensor; :func:`quantise` takes the merged ranges and lets ONNX
Runtime's quantiser place the QuantizeLinear/DequantizeLinear pairs (static, int8, weights per
output channel).

    to_onnx(model, input_shape) -> bytes        "input" (batch, *shape) → "logits" (batch, classes)
    augment(model) -> bytes                     the first output stays first
    observed(model) -> names                    what augment's model gives out besides
    quantise(model, thresholds) -> bytes        thresholds: observed name → (low, high)
    outputs(model, x) -> float32 (n, classes)   by ONNX Runtime, one thread
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, shape_inference

from atoll.server.errors import HubError

if TYPE_CHECKING:
    from torch import nn

INPUT: Final = "input"
OUTPUT: Final = "logits"
OPSET: Final = 18
IR_VERSION: Final = 10
"""ONNX Runtime 1.18 and later, and every other runtime of note, read these."""

_QUANTISED: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip", "MaxPool", "Concat")
"""Operators with an int8 kernel; what is between two of them stays in int8."""

Floats = npt.NDArray[np.float32]
Thresholds = Mapping[str, tuple[float, float]]


class BadExport(HubError):
    """A model that cannot be exported or quantised; change the task's model."""

    code = "bad-export"


def to_onnx(model: "nn.Module", input_shape: tuple[int, ...]) -> bytes:
    """Export ``model`` in evaluation mode; raise :class:`BadExport`.

    The file says nothing of the machine that wrote it: the exporter's stack traces and
    documentation strings are taken out.
    """
    import torch
    from onnxscript.optimizer import optimize_ir

    was_training = model.training
    model.eval()
    try:
        with _quietly():
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *input_shape),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
                external_data=False,
                optimize=False,
            )
            if program is not None:
                # What is computed from weights alone is folded, however large.
                optimize_ir(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadExport(f"the model cannot be exported to ONNX: {first}", _SIMPLER) from error
    finally:
        model.train(was_training)
    if program is None:
        raise BadExport("the model cannot be exported to ONNX", _SIMPLER)
    proto = program.model_proto
    _strip(proto)
    proto.ir_version = IR_VERSION
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def observed(model: bytes) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges :func:`quantise` wants."""
    graph = onnx.load_from_string(model).graph
    return (_OBSERVED_INPUT, *(name for node in graph.node for name in node.output if name))


def augment(model: bytes) -> bytes:
    """Return ``model`` with every floating tensor as an output, under its own name.

    A graph's input cannot be its output, so it is given out under ``input/observed``.
    """
    proto = onnx.load_from_string(model)
    graph = shape_inference.infer_shapes(proto).graph
    typed = {value.name: value for value in (*graph.value_info, *graph.output)}
    known = {value.name for value in proto.graph.output}
    for name in observed(model)[1:]:
        kind = typed[name].type.tensor_type.elem_type if name in typed else TensorProto.FLOAT
        if name not in known and kind == TensorProto.FLOAT:
            proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    proto.graph.node.append(helper.make_node("Identity", [INPUT], [_OBSERVED_INPUT]))
    proto.graph.output.append(
        helper.make_tensor_value_info(_OBSERVED_INPUT, TensorProto.FLOAT, None)
    )
    return bytes(proto.SerializeToString(deterministic=True))


def quantise(model: bytes, thresholds: Thresholds) -> bytes:
    """Return the int8 model; raise :class:`BadExport` when a tensor's range is missing.

    ``thresholds`` come from what devices observed on :func:`augment`'s model. Activations are
    int8 with a zero point, weights symmetric int8 per output channel, biases int32.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    proto = shape_inference.infer_shapes(onnx.load_from_string(model))
    # ONNX Runtime's quantiser names what it adds after the nodes, so each needs a name.
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    ranges = {name.removesuffix(_SUFFIX): span for name, span in thresholds.items()}
    data = TensorsData(
        CalibrationMethod.MinMax,
        {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()},
    )
    quantiser = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=data,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(_QUANTISED),
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    try:
        with _quietly():
            quantiser.quantize_model()
            quantiser.model.topological_sort()
    except (ValueError, KeyError, RuntimeError) as error:
        raise BadExport(f"the model cannot be quantised: {error}", _SIMPLER) from error
    quantised: onnx.ModelProto = quantiser.model.model
    _strip(quantised)
    onnx.checker.check_model(quantised)
    return bytes(quantised.SerializeToString(deterministic=True))


def outputs(model: bytes, x: Floats) -> Floats:
    """Run ``model`` on ``x``, float32 ``(n, *shape)``, with ONNX Runtime; raise :class:`BadExport`.

    The hub does so with synthetic inputs alone.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        logits = session.run([OUTPUT], {INPUT: x})[0]
    except (RuntimeError, ValueError) as error:
        raise BadExport(f"ONNX Runtime cannot run the model: {error}", _SIMPLER) from error
    return np.asarray(logits, dtype=np.float32)


def operators(model: bytes) -> Iterator[str]:
    """Yield the operator of every node, in the graph's order."""
    for node in onnx.load_from_string(model).graph.node:
        yield str(node.op_type)


_FOLDED: Final = 1 << 28
_SUFFIX: Final = "/observed"
_OBSERVED_INPUT: Final = INPUT + _SUFFIX
_SIMPLER: Final = "see the exporter's rules for control flow and operators, and change the task"


def _strip(proto: Any) -> None:  # noqa: ANN401 -- generated protobuf classes
    del proto.metadata_props[:]
    proto.doc_string = ""
    proto.producer_name, proto.producer_version = "atoll", ""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    graph.doc_string = ""
    del graph.metadata_props[:]


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the tools' notes about themselves (deprecations, missing torchvision) to ourselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
