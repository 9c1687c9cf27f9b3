"""One contract for every inference engine, on the same small linear model."""

import threading

import bench
import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from atoll.edge_agent.errors import BadModel
from atoll.edge_agent.runtime import Runtime, load


def tflite_model(seed: int) -> bytes:
    """Write the test model as a TFLite flatbuffer: reshape, then fully connected."""

    def tensor(name: str, shape: list[int], kind: int, buffer: int, signature=None):
        one = schema.TensorT()
        one.name, one.shape, one.type, one.buffer = name, shape, kind, buffer
        one.shapeSignature = signature
        return one

    def operator(code: int, inputs: list[int], output: int, kind: int, options: object):
        one = schema.OperatorT()
        one.opcodeIndex, one.inputs, one.outputs = code, inputs, [output]
        one.builtinOptionsType, one.builtinOptions = kind, options
        return one

    def code(builtin: int):
        one = schema.OperatorCodeT()
        one.builtinCode = one.deprecatedBuiltinCode = builtin
        one.version = 1
        return one

    def buffer(data: bytes = b""):
        one = schema.BufferT()
        one.data = list(data)
        return one

    types = schema.TensorType
    graph = schema.SubGraphT()
    graph.tensors = [
        tensor("x", [1, 2, 4], types.FLOAT32, 0, [-1, 2, 4]),
        tensor("new_shape", [2], types.INT32, 1),
        tensor("flat", [1, 8], types.FLOAT32, 0, [-1, 8]),
        tensor("w", [3, 8], types.FLOAT32, 2),
        tensor("logits", [1, 3], types.FLOAT32, 0, [-1, 3]),
    ]
    graph.inputs, graph.outputs = [0], [4]
    dense = schema.FullyConnectedOptionsT()
    options = schema.BuiltinOptions
    graph.operators = [
        operator(0, [0, 1], 2, options.ReshapeOptions, schema.ReshapeOptionsT()),
        operator(1, [2, 3, -1], 4, options.FullyConnectedOptions, dense),
    ]
    model = schema.ModelT()
    model.version, model.subgraphs = 3, [graph]
    model.operatorCodes = [
        code(schema.BuiltinOperator.RESHAPE),
        code(schema.BuiltinOperator.FULLY_CONNECTED),
    ]
    weights = np.ascontiguousarray(bench.weights(seed).T)
    model.buffers = [
        buffer(),
        buffer(np.array([-1, 8], np.int32).tobytes()),
        buffer(weights.tobytes()),
    ]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


MODELS = {".onnx": bench.onnx_model, ".tflite": tflite_model}


@pytest.fixture(params=MODELS)
def ending(request) -> str:
    return request.param


@pytest.fixture
def runtime(ending, tmp_path) -> Runtime:
    path = tmp_path / f"model{ending}"
    path.write_bytes(MODELS[ending](1))
    return load(path)


def test_ports_are_described(runtime):
    assert [tuple(port) for port in runtime.inputs] == [("x", (None, 2, 4), np.float32)]
    assert [tuple(port) for port in runtime.outputs] == [("logits", (None, 3), np.float32)]


@pytest.mark.parametrize("n", [1, 5, 2])
def test_computes_batches_of_any_size(runtime, n):
    x = bench.examples(n)
    got = runtime.run({"x": x})
    assert got.keys() == {"logits"}
    np.testing.assert_allclose(got["logits"], bench.logits(x, 1), rtol=1e-5, atol=1e-6)


def test_an_answer_outlives_the_next_call(runtime):
    first = runtime.run({"x": bench.examples(2, 1)})["logits"]
    kept = first.copy()
    runtime.run({"x": bench.examples(2, 2)})
    np.testing.assert_array_equal(first, kept)


def test_takes_calls_from_several_threads(runtime):
    wrong: list[int] = []

    def work(seed: int) -> None:
        for n in range(1, 30):
            x = bench.examples(n % 5 + 1, seed * 100 + n)
            got = runtime.run({"x": x})["logits"]
            if not np.allclose(got, bench.logits(x, 1), atol=1e-5):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_wrong_input_is_an_error_and_the_next_call_works(runtime):
    for bad in ({}, {"y": bench.examples(1)}, {"x": bench.examples(1).astype(np.float64)}):
        with pytest.raises(BadModel):
            runtime.run(bad)
    with pytest.raises(BadModel):
        runtime.run({"x": np.zeros((1, 3, 4), np.float32)})
    x = bench.examples(2)
    np.testing.assert_allclose(runtime.run({"x": x})["logits"], bench.logits(x, 1), rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 100])
def test_what_is_no_model_is_refused(ending, tmp_path, content):
    path = tmp_path / f"model{ending}"
    path.write_bytes(content)
    with pytest.raises(BadModel):
        load(path)
