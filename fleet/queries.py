"""What the hub may ask a device about its data, and what it may answer: sums, never rows.

These travel as the payloads of Flower "query" messages. They evolve like
:mod:`atoll.fleet.wire`: fields are added at the end with a default, never renamed, retyped or
removed, and unknown ones are ignored. A query is found by its name in :data:`ANSWERS`.
"""

from types import MappingProxyType
from typing import Final, Literal, TypeVar

import msgspec

from atoll.fleet.errors import BadMessage
from atoll.fleet.features import FINE_BINS, FeatureSpec, Ranges

Split = Literal["train", "test"]

MAX_QUERY_BYTES: Final = 1 << 30


class EvaluateOnnx(msgspec.Struct, frozen=True, kw_only=True):
    """Run this ONNX ``model`` over a split and count how it answers.

    With ``groups`` above 0 count by group too, where the task knows so many of them.
    """

    model: bytes
    split: Split
    groups: int = 0


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """``confusion[true][predicted]``, summing to ``rows``.

    ``by_group[group]`` is the same for the examples of a group; empty where none were asked for
    or the device knows of other groups than so many. Examples of no group are in none of them.
    """

    confusion: list[list[int]]
    rows: int
    by_group: list[list[list[int]]] = []


class ActivationRanges(msgspec.Struct, frozen=True, kw_only=True):
    """Run this float ONNX ``model`` and observe the values of its tensors."""

    model: bytes
    split: Split = "train"


class Activations(msgspec.Struct, frozen=True, kw_only=True):
    """Per tensor name a packed histogram (:mod:`atoll.fleet.ranges`)."""

    tensors: dict[str, bytes]
    rows: int = 0


class FeatureRanges(msgspec.Struct, frozen=True, kw_only=True):
    """Tell the ranges of the features; answered by :class:`atoll.fleet.features.Ranges`."""

    spec: FeatureSpec
    split: Split = "train"


class FeatureCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Count the features on an even grid over the merged ``ranges``."""

    spec: FeatureSpec
    ranges: Ranges
    bins: int = FINE_BINS
    split: Split = "train"


class ProfileCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Count a split into the bins of an encoded ``profile``, outputs of ``model`` included."""

    profile: bytes
    model: bytes
    split: Split = "train"


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Packed counts per variable (:func:`atoll.fleet.counts.pack_all`) of ``rows`` examples."""

    counts: dict[str, bytes]
    rows: int


Query = EvaluateOnnx | ActivationRanges | FeatureRanges | FeatureCounts | ProfileCounts
Answer = Evaluated | Activations | Ranges | Counted

EVALUATE_ONNX: Final = "evaluate-onnx"
ACTIVATION_RANGES: Final = "activation-ranges"
FEATURE_RANGES: Final = "feature-ranges"
FEATURE_COUNTS: Final = "feature-counts"
PROFILE_COUNTS: Final = "profile-counts"

ANSWERS: Final = MappingProxyType(
    {
        EVALUATE_ONNX: (EvaluateOnnx, Evaluated),
        ACTIVATION_RANGES: (ActivationRanges, Activations),
        FEATURE_RANGES: (FeatureRanges, Ranges),
        FEATURE_COUNTS: (FeatureCounts, Counted),
        PROFILE_COUNTS: (ProfileCounts, Counted),
    }
)
"""Query name → the types of the question and of its answer."""

_Payload = TypeVar("_Payload", bound=Query | Answer)


def encode(payload: Query | Answer) -> bytes:
    """Encode a question or an answer as MessagePack."""
    return msgspec.msgpack.encode(payload)


def decode(data: bytes, kind: type[_Payload]) -> _Payload:
    """Decode and validate; raise :class:`BadMessage` for anything else than a ``kind``."""
    if len(data) > MAX_QUERY_BYTES:
        raise BadMessage(f"query of {len(data)} bytes is over the limit of {MAX_QUERY_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(str(error)) from error
