"""What a device answers about its own data: counts and ranges, never rows.

One handler per query of :mod:`atoll.fleet.queries`, bytes to bytes. The examples come through
a function, so nothing here knows of tasks or paths.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.edge_agent.errors import BadModel
from atoll.edge_agent.onnx import Onnx
from atoll.edge_agent.watching import softmax
from atoll.fleet import features, profile, queries, ranges

BATCH: Final = 256


class Rows(NamedTuple):
    """A device's examples: ``x`` float32 ``(n, *shape)``, ``y`` int64 ``(n,)``.

    ``group`` int64 ``(n,)`` is one of ``groups``, or -1 for none; none for a task without groups.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64] | None = None
    groups: int = 0


Source = Callable[[queries.Split], Rows]
Handler = Callable[[bytes], bytes]


def handlers(source: Source) -> Mapping[str, Handler]:
    """Return the handlers by query name.

    A handler raises :class:`atoll.fleet.errors.FleetError` for a question it cannot read and
    :class:`BadModel` for a model it cannot run.
    """
    return MappingProxyType(
        {
            queries.EVALUATE_ONNX: lambda data: evaluate(source, data),
            queries.ACTIVATION_RANGES: lambda data: activation_ranges(source, data),
            queries.FEATURE_RANGES: lambda data: feature_ranges(source, data),
            queries.FEATURE_COUNTS: lambda data: feature_counts(source, data),
            queries.PROFILE_COUNTS: lambda data: profile_counts(source, data),
        }
    )


def evaluate(source: Source, data: bytes) -> bytes:
    """Count true against predicted classes of a model, by group too if these are asked for."""
    asked = queries.decode(data, queries.EvaluateOnnx)
    rows = source(asked.split)
    outputs = np.concatenate([first for first, _ in _run(asked.model, rows.x)])
    classes = max(outputs.shape[1], int(rows.y.max(initial=0)) + 1)
    predicted = outputs.argmax(axis=1)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (rows.y, predicted), 1)
    by_group = np.zeros((0, classes, classes), np.int64)
    if rows.group is not None and asked.groups == rows.groups:
        known = rows.group >= 0
        by_group = np.zeros((rows.groups, classes, classes), np.int64)
        np.add.at(by_group, (rows.group[known], rows.y[known], predicted[known]), 1)
    answer = queries.Evaluated(
        confusion=confusion.tolist(), rows=len(rows.y), by_group=by_group.tolist()
    )
    return queries.encode(answer)


def activation_ranges(source: Source, data: bytes) -> bytes:
    """Histogram every tensor that the model gives out; the hub made them all outputs."""
    asked = queries.decode(data, queries.ActivationRanges)
    rows = source(asked.split)
    seen: dict[str, ranges.Histogram] = {}
    for _, tensors in _run(asked.model, rows.x):
        for name, values in tensors.items():
            one = ranges.observe(values)
            seen[name] = ranges.merge(seen[name], one) if name in seen else one
    packed = {name: ranges.pack(histogram) for name, histogram in seen.items()}
    return queries.encode(queries.Activations(tensors=packed, rows=len(rows.y)))


def feature_ranges(source: Source, data: bytes) -> bytes:
    """Tell the lowest and highest value of each feature, widened."""
    asked = queries.decode(data, queries.FeatureRanges)
    found = features.features(asked.spec, source(asked.split).x)
    return queries.encode(features.feature_range(found))


def feature_counts(source: Source, data: bytes) -> bytes:
    """Count each feature on a fine even grid."""
    asked = queries.decode(data, queries.FeatureCounts)
    rows = source(asked.split)
    found = features.features(asked.spec, rows.x)
    counts = features.fine_counts(found, asked.ranges, asked.bins)
    return queries.encode(queries.Counted(counts=profile.pack_all(counts), rows=len(rows.y)))


def profile_counts(source: Source, data: bytes) -> bytes:
    """Count examples and the model's outputs into the bins of a profile."""
    asked = queries.decode(data, queries.ProfileCounts)
    bins = profile.Profile.decode(asked.profile)
    rows = source(asked.split)
    outputs = np.concatenate([first for first, _ in _run(asked.model, rows.x)])
    found = features.features(bins.features, rows.x)
    counts = profile.count(bins, found, softmax(outputs))
    return queries.encode(queries.Counted(counts=profile.pack_all(counts), rows=len(rows.y)))


def _run(
    model: bytes, x: npt.NDArray[np.float32]
) -> Iterator[tuple[npt.NDArray[np.floating], dict[str, npt.NDArray[np.floating]]]]:
    """Run a one-input model in batches; yield its first output and all floating ones.

    Without rows there is one empty batch, made of a row of zeros that is cut off again: not
    every operator takes an empty one.
    """
    engine = Onnx(model)
    if len(engine.inputs) != 1 or not engine.outputs:
        raise BadModel("the model must have one input and an output")
    name = engine.inputs[0].name
    for start in range(0, max(len(x), 1), BATCH):
        if len(x):
            values = engine.run({name: x[start : start + BATCH]})
        else:
            values = engine.run({name: np.zeros((1, *x.shape[1:]), np.float32)})
            values = {tensor: value[:0] for tensor, value in values.items()}
        floating = {name: value for name, value in values.items() if value.dtype.kind == "f"}
        yield values[engine.outputs[0].name], floating
