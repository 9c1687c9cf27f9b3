import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.fleet.errors import BadMessage
from atoll.fleet.features import FeatureSpec, Ranges
from atoll.fleet.queries import (
    ANSWERS,
    ActivationRanges,
    Activations,
    Counted,
    Evaluated,
    EvaluateOnnx,
    FeatureCounts,
    FeatureRanges,
    ProfileCounts,
    decode,
    encode,
)

SPEC = FeatureSpec(kind="channel-stats", channels=("x",))
PAYLOADS = [
    EvaluateOnnx(model=b"m", split="test"),
    Evaluated(confusion=[[1, 0], [2, 3]], rows=6),
    ActivationRanges(model=b"m"),
    Activations(tensors={"t": b"\x01"}, rows=3),
    FeatureRanges(spec=SPEC),
    FeatureCounts(spec=SPEC, ranges=Ranges({"x:mean": (0.0, 1.0)})),
    ProfileCounts(profile=b"p", model=b"m"),
    Counted(counts={"x:mean": b"\x01"}, rows=1),
    Ranges({"x:mean": (-1.0, 1.0)}),
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: type(p).__name__)
def test_a_payload_survives_and_fields_of_a_later_version_are_ignored(payload) -> None:
    assert decode(encode(payload), type(payload)) == payload
    later = {**msgspec.msgpack.decode(encode(payload)), "later": 1}
    assert decode(msgspec.msgpack.encode(later), type(payload)) == payload


def test_every_query_has_a_question_and_an_answer_that_travel() -> None:
    assert set(ANSWERS) == {
        "evaluate-onnx",
        "activation-ranges",
        "feature-ranges",
        "feature-counts",
        "profile-counts",
    }
    kinds = {type(payload) for payload in PAYLOADS}
    assert {kind for pair in ANSWERS.values() for kind in pair} == kinds


@settings(max_examples=300)
@given(st.sampled_from(PAYLOADS), st.data())
def test_damaged_bytes_are_a_payload_or_refused(payload, data) -> None:
    encoded = bytearray(encode(payload))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(encoded), type(payload))
    except BadMessage:
        return


def test_a_range_that_is_none_is_refused_as_a_message() -> None:
    with pytest.raises(BadMessage, match="no usable range"):
        decode(msgspec.msgpack.encode({"spans": {"a": (float("nan"), 1.0)}}), Ranges)
