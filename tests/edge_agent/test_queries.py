"""What a device answers about its data: exact counts, checked against numpy."""

import bench
import numpy as np
import onnx
import pytest

from atoll.edge_agent.errors import BadModel
from atoll.edge_agent.queries import Rows, handlers
from atoll.fleet import features, profile, queries, ranges
from atoll.fleet.errors import BadMessage
from atoll.fleet.features import FeatureSpec

TRAIN = Rows(bench.examples(600, 1), np.random.default_rng(1).integers(0, 3, 600))
TEST = Rows(bench.examples(40, 2), np.random.default_rng(2).integers(0, 3, 40))
SPEC = FeatureSpec(kind="channel-stats", channels=bench.CHANNELS)


def ask(name: str, question: queries.Query, rows: Rows | None = None):
    def source(split: queries.Split) -> Rows:
        return rows or (TRAIN if split == "train" else TEST)

    return queries.decode(
        handlers(source)[name](queries.encode(question)), queries.ANSWERS[name][1]
    )


def test_every_query_has_a_handler():
    assert handlers(lambda _: TEST).keys() == queries.ANSWERS.keys()


def test_evaluation_counts_true_against_predicted():
    question = queries.EvaluateOnnx(model=bench.onnx_model(1), split="test")
    found = ask(queries.EVALUATE_ONNX, question)
    predicted = bench.logits(TEST.x, 1).argmax(axis=1)
    expected = np.zeros((3, 3), int)
    for truth, guess in zip(TEST.y, predicted, strict=True):
        expected[truth][guess] += 1
    assert found == queries.Evaluated(confusion=expected.tolist(), rows=40)


def augmented() -> bytes:
    """Make the input and the activation between outputs, after the true output."""
    model = onnx.load_from_string(bench.onnx_model(1))
    for name, shape in (("flat", ["n", 8]),):
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        model.graph.output.append(value)
    return model.SerializeToString()


def test_activation_ranges_are_those_of_all_values_at_once():
    found = ask(queries.ACTIVATION_RANGES, queries.ActivationRanges(model=augmented()))
    assert found.rows == 600
    flat = TRAIN.x.reshape(600, -1)
    assert ranges.unpack(found.tensors["flat"]) == ranges.observe(flat)
    logits = ranges.unpack(found.tensors["logits"])
    low, high = ranges.thresholds(logits)
    truth = bench.logits(TRAIN.x, 1)
    width = 2.0**logits.exponent
    assert low - 1e-5 <= truth.min() <= low + width + 1e-5
    assert high - width - 1e-5 <= truth.max() <= high + 1e-5
    assert logits.total == truth.size


def test_feature_ranges_and_counts_lead_to_a_profile():
    spans = ask(queries.FEATURE_RANGES, queries.FeatureRanges(spec=SPEC))
    found = features.features(SPEC, TRAIN.x)
    assert spans == features.feature_range(found)
    counted = ask(queries.FEATURE_COUNTS, queries.FeatureCounts(spec=SPEC, ranges=spans))
    fine = {name: profile.unpack_counts(packed) for name, packed in counted.counts.items()}
    expected = features.fine_counts(found, spans)
    for name, counts in expected.items():
        np.testing.assert_array_equal(fine[name], counts)
    bins = profile.build(SPEC, features.quantile_edges(fine, spans), bench.CLASSES)
    question = queries.ProfileCounts(profile=bins.encode(), model=bench.onnx_model(1))
    counted = ask(queries.PROFILE_COUNTS, question)
    counts = profile.unpack_all(counted.counts, bins.bins)
    assert counted.rows == 600
    assert all(vector.sum() == 600 for vector in counts.values())
    predicted = bench.logits(TRAIN.x, 1).argmax(axis=1)
    np.testing.assert_array_equal(
        counts[profile.OUTPUT_CLASS][:3], np.bincount(predicted, minlength=3)
    )


def test_a_device_without_rows_answers_with_nothing():
    none = Rows(TRAIN.x[:0], TRAIN.y[:0])
    question = queries.EvaluateOnnx(model=bench.onnx_model(1), split="test")
    assert ask(queries.EVALUATE_ONNX, question, none).rows == 0
    found = ask(queries.ACTIVATION_RANGES, queries.ActivationRanges(model=augmented()), none)
    assert found.rows == 0


def test_nonsense_is_refused():
    all_of_them = handlers(lambda _: TEST)
    for handler in all_of_them.values():
        with pytest.raises(BadMessage):
            handler(b"nonsense")
    with pytest.raises(BadModel):
        ask(queries.EVALUATE_ONNX, queries.EvaluateOnnx(model=b"nonsense", split="test"))


def test_evaluation_counts_by_group_where_so_many_are_asked_for():
    group = np.random.default_rng(3).integers(-1, 2, 40)
    rows = TEST._replace(group=group, groups=2)
    question = queries.EvaluateOnnx(model=bench.onnx_model(1), split="test", groups=2)
    found = ask(queries.EVALUATE_ONNX, question, rows)
    predicted = bench.logits(TEST.x, 1).argmax(axis=1)
    expected = np.zeros((2, 3, 3), int)
    for where, truth, guess in zip(group, TEST.y, predicted, strict=True):
        if where >= 0:
            expected[where][truth][guess] += 1
    assert found.by_group == expected.tolist()
    assert found.rows == 40


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_no_group_is_counted_that_was_not_asked_for_or_means_another(groups):
    rows = TEST._replace(group=np.zeros(40, np.int64), groups=2)
    question = queries.EvaluateOnnx(model=bench.onnx_model(1), split="test", groups=groups)
    assert ask(queries.EVALUATE_ONNX, question, rows).by_group == []
    assert ask(queries.EVALUATE_ONNX, question, TEST).by_group == []
