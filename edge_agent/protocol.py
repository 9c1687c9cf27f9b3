"""The Open Inference Protocol v2 on the wire: requests into arrays, arrays into answers.

KServe's specification ("Predict Protocol, version 2") with its binary tensor data extension:
the JSON may be followed by raw little-endian tensors when the header
``Inference-Header-Content-Length`` says how long the JSON is. Nothing here knows HTTP.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from atoll.edge_agent.errors import AgentError
from atoll.edge_agent.runtime import Port, Tensor

DATATYPES: Final[dict[str, type[np.generic]]] = {
    "BOOL": np.bool_,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
_NAMES: Final = {np.dtype(kind): name for name, kind in DATATYPES.items()}
_BINARY: Final = "binary_data_size"


class BadRequest(AgentError):
    """A request that cannot be answered; the sentence goes back to the client."""


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: Any = None
    parameters: dict[str, Any] = {}


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str | None = None
    outputs: list[_Output] | None = None
    parameters: dict[str, Any] = {}


class Wanted(NamedTuple):
    """A request that was understood: outputs by name, and whether each is wanted as bytes."""

    id: str | None
    feeds: dict[str, Tensor]
    outputs: dict[str, bool]


class Answer(NamedTuple):
    """A body, and the length of its JSON when raw tensors follow it."""

    body: bytes
    json_length: int | None


def datatype(port: Port) -> str:
    """Return the protocol's name for a port's dtype."""
    return _NAMES[port.dtype]


def describe(port: Port) -> dict[str, object]:
    """Return a port as model metadata shows it; -1 where any length goes."""
    shape = [-1 if size is None else size for size in port.shape]
    return {"name": port.name, "datatype": datatype(port), "shape": shape}


def parse(
    body: bytes, json_length: int | None, inputs: Sequence[Port], outputs: Sequence[Port]
) -> Wanted:
    """Read an inference request for a model with these ports; raise :class:`BadRequest`."""
    if json_length is not None and not 0 <= json_length <= len(body):
        raise BadRequest("Inference-Header-Content-Length is not within the body")
    head, tail = (body, b"") if json_length is None else (body[:json_length], body[json_length:])
    try:
        request = msgspec.json.decode(head, type=_Request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request cannot be read: {error}") from error
    given = {one.name: one for one in request.inputs}
    expected = {port.name: port for port in inputs}
    if len(given) != len(request.inputs) or given.keys() != expected.keys():
        raise BadRequest(
            f"inputs must be {_listed(expected)}, each once; got "
            f"{_listed([one.name for one in request.inputs])}"
        )
    raw = memoryview(tail)
    feeds = {}
    for one in request.inputs:
        size = one.parameters.get(_BINARY)
        if size is not None:
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(raw):
                raise BadRequest(f"input {one.name!r}: {_BINARY} does not fit the body")
            part, raw = raw[:size], raw[size:]
            feeds[one.name] = _tensor(one, expected[one.name], part)
        else:
            feeds[one.name] = _tensor(one, expected[one.name], None)
    if len(raw):
        raise BadRequest(f"{len(raw)} bytes follow the last tensor")
    if len({len(tensor) for tensor in feeds.values()}) > 1:
        raise BadRequest("inputs differ in their first axis, the batch")
    return Wanted(request.id, feeds, _outputs(request, [port.name for port in outputs]))


def _outputs(request: _Request, names: Sequence[str]) -> dict[str, bool]:
    everything = request.parameters.get("binary_data_output") is True
    if request.outputs is None:
        return dict.fromkeys(names, everything)
    wanted: dict[str, bool] = {}
    for one in request.outputs:
        if one.name not in names:
            raise BadRequest(f"there is no output {one.name!r}; there is {_listed(names)}")
        wanted[one.name] = one.parameters.get("binary_data", everything) is True
    return wanted


def _tensor(one: _Input, port: Port, raw: memoryview | None) -> Tensor:
    """Return one input's array: of the port's dtype and shape, and finite."""
    label = f"input {one.name!r}"
    if one.datatype != datatype(port):
        raise BadRequest(f"{label} must be {datatype(port)}, not {one.datatype}")
    want = [-1 if size is None else size for size in port.shape]
    fits = len(one.shape) == len(want) and all(
        size >= 1 and (axis is None or size == axis)
        for size, axis in zip(one.shape, port.shape, strict=True)
    )
    if not fits:
        raise BadRequest(f"{label} must have shape {want} (-1: any), not {one.shape}")
    if raw is not None:
        if one.data is not None:
            raise BadRequest(f"{label} has both data and {_BINARY}")
        array = _from_bytes(label, raw, port.dtype, one.shape)
    else:
        array = _from_json(label, one.data, port.dtype, one.shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(f"{label} holds NaN or infinity")
    return array


def _from_bytes(label: str, raw: memoryview, dtype: np.dtype[Any], shape: list[int]) -> Tensor:
    if len(raw) != prod(shape) * dtype.itemsize:
        raise BadRequest(f"{label}: {len(raw)} bytes do not make {shape} of {dtype}")
    if dtype.kind == "b" and (np.frombuffer(raw, np.uint8) > 1).any():
        raise BadRequest(f"{label}: booleans are bytes of 0 or 1")
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape).astype(dtype)


def _from_json(label: str, data: object, dtype: np.dtype[Any], shape: list[int]) -> Tensor:
    """Read flat or nested data whose numbers are of the declared kind and range."""
    if not isinstance(data, list):
        raise BadRequest(f"{label} has no data")
    try:
        loose = np.array(data)
    except ValueError as error:
        raise BadRequest(f"{label}: data is ragged") from error
    if loose.size != prod(shape) or (loose.ndim > 1 and list(loose.shape) != shape):
        raise BadRequest(f"{label}: data of shape {list(loose.shape)} does not fill {shape}")
    kinds = {"f": "fiu", "b": "b"}.get(dtype.kind, "iu")
    if loose.dtype.kind not in kinds:
        raise BadRequest(f"{label}: data is not all of {_NAMES[dtype]}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if (loose < limits.min).any() or (loose > limits.max).any():
            raise BadRequest(f"{label}: a number is out of the range of {_NAMES[dtype]}")
    with np.errstate(over="ignore"):
        return loose.reshape(shape).astype(dtype)


def answer(
    model: str, version: str, wanted: Wanted, values: Mapping[str, Tensor], ports: Sequence[Port]
) -> Answer:
    """Encode the wanted outputs.

    Raises :class:`BadRequest` for outputs that JSON has no way to write (NaN, infinity);
    they can be had as bytes.
    """
    by_name = {port.name: port for port in ports}
    outputs: list[dict[str, object]] = []
    tails: list[bytes] = []
    for name, binary in wanted.outputs.items():
        array = np.ascontiguousarray(values[name])
        entry: dict[str, object] = {
            "name": name,
            "datatype": datatype(by_name[name]),
            "shape": list(array.shape),
        }
        if binary:
            tails.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
            entry["parameters"] = {_BINARY: len(tails[-1])}
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise BadRequest(f"output {name!r} is not finite; ask for it as binary data")
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    head: dict[str, object] = {"model_name": model, "model_version": version, "outputs": outputs}
    if wanted.id is not None:
        head["id"] = wanted.id
    encoded = msgspec.json.encode(head)
    return Answer(encoded + b"".join(tails), len(encoded) if tails else None)


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
