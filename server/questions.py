"""What the hub asks a cohort about data it never sees, and how the answers become one.

Every question goes to several devices as a Flower message; every answer is a sum of some kind
(confusion counts, histograms, ranges, bin counts) and merges exactly. An answer that does not
fit the question is left out like one that never came; too few of them end the run.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from atoll.federation import evaluation
from atoll.federation.cohort import Cohort
from atoll.federation.errors import RoundFailed
from atoll.federation.exchange import Clock
from atoll.fleet import features, profile, queries, ranges
from atoll.fleet.counts import MAX_COUNT, merge, unpack_all
from atoll.fleet.errors import BadMessage, BadProfile
from atoll.fleet.features import FINE_BINS, FeatureSpec
from atoll.fleet.profile import Profile
from atoll.fleet.queries import Split

Confusion = npt.NDArray[np.int64]
"""``[true, predicted]``, int64 ``(classes, classes)``."""

ByGroup = npt.NDArray[np.int64]
"""``[group, true, predicted]``, int64 ``(groups, classes, classes)``."""

_Answer = TypeVar("_Answer", bound=queries.Answer)


class Tally(NamedTuple):
    """``correct`` of ``rows`` examples."""

    correct: int
    rows: int

    @property
    def accuracy(self) -> float:
        """Share that is correct; NaN for no rows, which no gate lets pass."""
        return self.correct / self.rows if self.rows else float("nan")

    def __add__(self, other: object) -> "Tally":
        """Return the tally of both."""
        if not isinstance(other, Tally):
            return NotImplemented
        return Tally(self.correct + other.correct, self.rows + other.rows)

    @classmethod
    def of(cls, confusion: Confusion) -> "Tally":
        """Return the tally of a confusion matrix."""
        return cls(int(np.trace(confusion)), int(confusion.sum()))


class Evaluation(NamedTuple):
    """How a model did on a device; ``by_group`` is none where the device counted no groups."""

    confusion: Confusion
    by_group: ByGroup | None


@dataclass(frozen=True, slots=True)
class Questions:
    """Puts questions to devices of a cohort and waits ``timeout`` seconds for the answers.

    ``least`` devices must answer a question that decides something for all.
    """

    grid: Grid
    cohort: Cohort
    timeout: float
    least: int
    clock: Clock

    def evaluations(
        self,
        model: bytes,
        devices: Collection[str],
        classes: int,
        groups: int = 0,
        split: Split = "test",
    ) -> dict[str, Evaluation]:
        """Evaluate an ONNX model on each device's split; devices that did not answer are absent."""
        question = queries.EvaluateOnnx(model=model, split=split, groups=groups)
        answers = self._ask(queries.EVALUATE_ONNX, question, devices, queries.Evaluated)
        found = {}
        for device, answer in answers.items():
            if _square(answer.confusion, classes, answer.rows):
                confusion = np.array(answer.confusion, dtype=np.int64)
                found[device] = Evaluation(confusion, _parts(answer.by_group, confusion, groups))
        return found

    def activations(
        self, model: bytes, devices: Collection[str], tensors: Collection[str]
    ) -> dict[str, ranges.Histogram]:
        """Observe every one of ``tensors`` on the devices' training data; merged by name."""
        question = queries.ActivationRanges(model=model)
        answers = self._ask(queries.ACTIVATION_RANGES, question, devices, queries.Activations)
        parts = []
        for answer in answers.values():
            if answer.tensors.keys() >= set(tensors):
                try:
                    parts.append({name: ranges.unpack(answer.tensors[name]) for name in tensors})
                except BadProfile:
                    continue
        self._enough(queries.ACTIVATION_RANGES, len(parts), devices)
        return {
            name: reduce(ranges.merge, (part[name] for part in parts), ranges.EMPTY)
            for name in tensors
        }

    def reference_profile(
        self, spec: FeatureSpec, classes: tuple[str, ...], model: bytes, devices: Collection[str]
    ) -> Profile:
        """Return the reference profile of the devices' population.

        Bin edges are quantiles of the training data; the reference counts are those of the
        held-back data, because a model is too sure of what it was trained on.
        """
        spans = self._ranges(spec, devices)
        fine = self._fine(spec, spans, devices)
        empty = profile.build(spec, features.quantile_edges(fine, spans), classes)
        question = queries.ProfileCounts(profile=empty.encode(), model=model, split="test")
        answers = self._ask(queries.PROFILE_COUNTS, question, devices, queries.Counted)
        parts, rows = self._counted(queries.PROFILE_COUNTS, answers, empty.bins, devices)
        return empty.with_counts(parts, rows)

    def _ranges(self, spec: FeatureSpec, devices: Collection[str]) -> features.Ranges:
        question = queries.FeatureRanges(spec=spec)
        answers = self._ask(queries.FEATURE_RANGES, question, devices, features.Ranges)
        fit = [answer for answer in answers.values() if answer.spans.keys() <= set(spec.numeric)]
        self._enough(queries.FEATURE_RANGES, len(fit), devices)
        return reduce(lambda one, other: one.merge(other), fit)

    def _fine(
        self, spec: FeatureSpec, spans: features.Ranges, devices: Collection[str]
    ) -> dict[str, profile.Counts]:
        question = queries.FeatureCounts(spec=spec, ranges=spans)
        answers = self._ask(queries.FEATURE_COUNTS, question, devices, queries.Counted)
        bins = dict.fromkeys(spans.spans, FINE_BINS + 1)
        return self._counted(queries.FEATURE_COUNTS, answers, bins, devices)[0]

    def _counted(
        self,
        name: str,
        answers: Mapping[str, queries.Counted],
        bins: Mapping[str, int],
        devices: Collection[str],
    ) -> tuple[dict[str, profile.Counts], int]:
        parts, rows = [], 0
        for answer in answers.values():
            try:
                counts = unpack_all(answer.counts, bins)
            except BadProfile:
                continue
            if all(int(vector.sum()) == answer.rows for vector in counts.values()):
                parts.append(counts)
                rows += answer.rows
        self._enough(name, len(parts), devices)
        return reduce(merge, parts), rows

    def _ask(
        self, name: str, question: queries.Query, devices: Collection[str], kind: type[_Answer]
    ) -> dict[str, _Answer]:
        nodes = {device: self.cohort.nodes[device] for device in devices}
        payload = queries.encode(question)
        found = {}
        for device, data in evaluation.ask(
            self.grid, nodes, name, payload, self.timeout, clock=self.clock
        ).items():
            try:
                found[device] = queries.decode(data, kind)
            except (BadMessage, BadProfile):
                continue
        return found

    def _enough(self, name: str, answered: int, devices: Collection[str]) -> None:
        if answered < self.least:
            raise RoundFailed(
                f"{answered} of {len(devices)} devices answered the question {name!r} and the "
                f"plan needs {self.least}; look at why the others did not, then run it again"
            )


def _parts(found: list[list[list[int]]], whole: Confusion, groups: int) -> ByGroup | None:
    """Return the counts of so many groups, if these are parts of ``whole``."""
    classes = len(whole)
    if not groups or len(found) != groups:
        return None
    if not all(_square(part, classes, sum(map(sum, part))) for part in found):
        return None
    parts = np.array(found, dtype=np.int64)
    return parts if (parts.sum(axis=0) <= whole).all() else None


def _square(rows: list[list[int]], classes: int, total: int) -> bool:
    """Tell whether these are counts ``classes`` × ``classes`` that add up to ``total``."""
    return (
        len(rows) == classes
        and all(len(row) == classes for row in rows)
        and all(0 <= count <= MAX_COUNT for row in rows for count in row)
        and sum(map(sum, rows)) == total
    )
