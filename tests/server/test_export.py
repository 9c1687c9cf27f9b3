import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from waves import LENGTH, Waves

from atoll.edge_agent.queries import Rows, handlers  # after the path
from atoll.fleet import queries, ranges
from atoll.server import export
from atoll.simulations.spar import Spar


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(200, 2, LENGTH)).astype(np.float32)


@pytest.fixture(scope="module")
def exact():
    return export.to_onnx(Waves().model(1), (2, LENGTH))


@pytest.fixture(scope="module")
def thresholds(exact, x):
    # As a device answers it.
    answer = handlers(lambda _: Rows(x, np.zeros(len(x), np.int64)))[queries.ACTIVATION_RANGES](
        queries.encode(queries.ActivationRanges(model=export.augment(exact)))
    )
    seen = queries.decode(answer, queries.Activations)
    assert set(seen.tensors) >= set(export.observed(exact))
    return {name: ranges.thresholds(ranges.unpack(seen.tensors[name])) for name in seen.tensors}


def test_the_exported_model_answers_as_torch_does(exact, x):
    model = Waves().model(1).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(export.outputs(exact, x), expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_batch_is_free(exact, x, rows):
    assert export.outputs(exact, x[:rows]).shape == (rows, 3)


def test_export_leaves_the_model_in_its_mode():
    model = Waves().model(1).train()
    export.to_onnx(model, (2, LENGTH))
    assert model.training


def test_the_file_says_nothing_of_the_machine_that_wrote_it(exact):
    for word in (str(Path.cwd()), str(Path(torch.__file__).parent), "waves.py", "stack"):
        assert word.encode() not in exact


def test_exporting_twice_gives_the_same_bytes(exact):
    assert export.to_onnx(Waves().model(1), (2, LENGTH)) == exact


def test_augmenting_adds_every_tensor_and_keeps_the_answer_first(exact, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        export.augment(exact), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    assert names[0] == export.OUTPUT
    assert set(names) == set(export.observed(exact))
    values = dict(zip(names, session.run(None, {export.INPUT: x}), strict=True))
    np.testing.assert_array_equal(values["input/observed"], x)


def test_int8_is_smaller_and_close(exact, thresholds, x):
    shipped = export.quantise(exact, thresholds)
    exact_logits, logits = export.outputs(exact, x), export.outputs(shipped, x)
    assert np.abs(logits - exact_logits).max() < 0.05 * np.ptp(exact_logits)
    assert (logits.argmax(1) == exact_logits.argmax(1)).mean() > 0.95


def test_the_big_operators_are_int8_and_weights_per_channel(exact, thresholds):
    import onnx

    model = onnx.load_from_string(export.quantise(exact, thresholds))
    produced = {name: node for node in model.graph.node for name in node.output}
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    heavy = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(heavy) == 3
    for node in heavy:
        inputs = [produced[name] for name in node.input[:2]]
        assert [one.op_type for one in inputs] == ["DequantizeLinear"] * 2
        channels = scales[inputs[1].input[0]].shape[0]
        assert scales[inputs[1].input[1]].shape == (channels,)
        assert scales[inputs[1].input[0]].dtype == np.int8


def test_a_network_with_weights_computed_from_weights_is_folded():
    exact = export.to_onnx(Spar().model(0), Spar.input_shape)
    assert sorted(export.operators(exact)) == sorted(
        ["Mul", *["Conv", "Relu"] * 3, "ReduceMean", "ReduceMax", "Concat", "Gemm"]
    )


def test_a_missing_range_is_said(exact, thresholds):
    short = {name: span for name, span in thresholds.items() if name != "relu"}
    short.pop("input/observed")
    with pytest.raises(export.BadExport, match="cannot be quantised"):
        export.quantise(exact, short)


class _Fickle(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=2) if float(x.sum()) > 0 else x.mean(dim=2)


def test_a_model_that_cannot_be_exported_is_said_in_one_sentence():
    with pytest.raises(export.BadExport) as caught:
        export.to_onnx(_Fickle(), (2, LENGTH))
    assert "\n" not in str(caught.value)
    assert "cannot be exported" in str(caught.value)
