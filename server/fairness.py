"""Whether a model treats groups of examples alike, from counts summed over all devices.

A device answers how often each class was taken for each, by group (:class:`Grouped
<atoll.federation.task.Grouped>`). Those counts are added up over all devices before anything
is computed, because a rate of one device is a rate of a person. With more than two classes each
is judged against the rest, as Fairlearn (S. Bird et al., 2020) does for two:

- **demographic parity**: groups are told a class equally often, P(Ŷ = c | A = g). It asks nothing
  about the truth, so where groups differ in it a perfect model fails.
- **equalised odds** (M. Hardt, E. Price and N. Srebro, "Equality of Opportunity in Supervised
  Learning", NeurIPS 2016): they are told it equally often when it is true, P(Ŷ = c | Y = c, A = g),
  and when it is not; the larger of both differences. The first alone is **equal opportunity**.

A difference is that of the largest and the smallest rate of any group, a ratio the smallest
over the largest; beside the worst of all classes stands their mean. A class of which a group has
no example cannot be compared: it is in neither, and ``compared`` says how many classes are. What
cannot be told at all is absent, so that no gate lets it pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.server.small_groups import shown

Counts = npt.NDArray[np.int64]
"""``[group, true, predicted]``, int64 ``(groups, classes, classes)``."""
Rates = npt.NDArray[np.float64]
"""A rate by group and class, ``(groups, classes)``; NaN where there is no example to tell."""


class Judged(NamedTuple):
    """Differences and ratio by class, float64 ``(classes,)``; NaN where nothing can be compared."""

    demographic_parity: npt.NDArray[np.float64]
    demographic_parity_ratio: npt.NDArray[np.float64]
    equal_opportunity: npt.NDArray[np.float64]
    equalised_odds: npt.NDArray[np.float64]


def judge(counts: Counts) -> Judged:
    """Judge each class against the rest."""
    chosen = selection_rates(counts)
    right = difference(true_positive_rates(counts))
    wrong = difference(false_positive_rates(counts))
    return Judged(difference(chosen), ratio(chosen), right, np.maximum(right, wrong))


def selection_rates(counts: Counts) -> Rates:
    """Return P(Ŷ = c | A = g)."""
    return _share(counts.sum(axis=1), counts.sum(axis=(1, 2))[:, None])


def true_positive_rates(counts: Counts) -> Rates:
    """Return P(Ŷ = c | Y = c, A = g)."""
    return _share(np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=2))


def false_positive_rates(counts: Counts) -> Rates:
    """Return P(Ŷ = c | Y ≠ c, A = g)."""
    right, true = np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=2)
    return _share(counts.sum(axis=1) - right, true.sum(axis=1, keepdims=True) - true)


def difference(rates: Rates) -> npt.NDArray[np.float64]:
    """Return by class the largest rate of a group less the smallest; NaN if one is missing."""
    found: npt.NDArray[np.float64] = rates.max(axis=0) - rates.min(axis=0)
    return found


def ratio(rates: Rates) -> npt.NDArray[np.float64]:
    """Return by class the smallest rate over the largest; NaN if that is 0 or one is missing."""
    return _share(rates.min(axis=0), rates.max(axis=0))


def of_devices(
    answers: Mapping[str, Counts], groups: Sequence[str], classes: Sequence[str], least: int
) -> dict[str, Any]:
    """Return the fact ``fairness``, from each device's counts, which are summed first.

    Groups of which fewer than ``least`` devices hold examples are neither shown nor compared. With
    fewer than two of them there is nothing to compare, and the measures are absent.
    """
    holders = {
        name: [device for device, counts in answers.items() if counts[place].any()]
        for place, name in enumerate(groups)
    }
    kept = shown({name: who for name, who in holders.items() if who}, least)
    facts: dict[str, Any] = {
        "devices": len(answers),
        "groups": {},
        "left_out": {
            name: "no examples"
            if not who
            else f"on {len(who)} of {len(answers)} devices; cohort.min_devices is {least}"
            if len(who) < least
            else "a small group could be worked out from it"
            for name, who in holders.items()
            if name not in kept
        },
    }
    if not kept:
        return facts
    summed = np.sum(list(answers.values()), axis=0)[[groups.index(name) for name in kept]]
    rows, right = summed.sum(axis=(1, 2)), np.trace(summed, axis1=1, axis2=2)
    for place, name in enumerate(kept):
        facts["groups"][name] = {
            "devices": len(holders[name]),
            "rows": int(rows[place]),
            "accuracy": float(right[place] / rows[place]),
        }
    return facts if len(kept) == 1 else facts | _measures(summed, classes)


def _measures(summed: Counts, classes: Sequence[str]) -> dict[str, Any]:
    judged = judge(summed)
    right = np.trace(summed, axis1=1, axis2=2) / summed.sum(axis=(1, 2))
    facts: dict[str, Any] = {
        "accuracy_difference": float(np.ptp(right)),
        "compared": int(np.isfinite(judged.equalised_odds).sum()),
        "by_class": {
            name: _finite({measure: values[place] for measure, values in judged._asdict().items()})
            for place, name in enumerate(classes)
        },
    }
    for measure, values in judged._asdict().items():
        known = values[np.isfinite(values)]
        if known.size:
            worst = known.min() if measure.endswith("ratio") else known.max()
            facts |= {measure: float(worst), f"{measure}_mean": float(known.mean())}
    return facts


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _share(
    part: npt.NDArray[np.int64] | npt.NDArray[np.float64],
    whole: npt.NDArray[np.int64] | npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return part over whole; NaN where that is 0 or not known."""
    over = np.broadcast_to(np.asarray(whole, dtype=np.float64), part.shape)
    found = np.full(part.shape, np.nan)
    np.divide(part, over, out=found, where=over > 0)
    return found
