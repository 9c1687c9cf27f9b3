"""How alike devices fare under one model: accuracy over the devices of a cohort, and its spread.

A mean hides who pays for it, so beside it stand the standard deviation over devices, the worst
and the best of them, and the mean of the worst tenth (as T. Li, Sanjabi, Beirami and V. Smith,
"Fair Resource Allocation in Federated Learning", ICLR 2020, report it). In these every device
weighs the same, however many examples it holds. Pure functions over counts.

Cohorts are the sides (:mod:`atoll.server.measures`) and each value of each label that devices
carry. A small one is not shown by itself (:mod:`atoll.server.small_groups`).
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

import numpy as np

from atoll.server.measures import Sides, total
from atoll.server.questions import Tally
from atoll.server.small_groups import shown

Labels = Mapping[str, Mapping[str, str]]
"""The labels of each device."""

_TENTH: Final = 10


def over_devices(tallies: Mapping[str, Tally], devices: Collection[str]) -> dict[str, float]:
    """Return what a model did on ``devices``, those of them that hold examples.

    ``accuracy`` is that of all examples together; the rest is over devices: ``mean``, ``std``
    (of this population, not an estimate of a larger one's), ``worst``, ``worst_tenth``, ``best``.
    One device at least must hold examples.
    """
    found = sorted(tallies[name].accuracy for name in devices if tallies[name].rows)
    whole = total(tallies, devices)
    return {
        "devices": len(found),
        "rows": whole.rows,
        "accuracy": whole.accuracy,
        "mean": float(np.mean(found)),
        "std": float(np.std(found)),
        "worst": found[0],
        "worst_tenth": float(np.mean(found[: math.ceil(len(found) / _TENTH)])),
        "best": found[-1],
    }


def by_cohort(
    tallies: Mapping[str, Tally], sides: Sides, labels: Labels, least: int
) -> dict[str, Any]:
    """Return the facts ``spread``, by cohort, and ``spread_left_out``: why others are not in it.

    ``sides`` hold the devices of ``tallies``; cohorts of fewer than ``least`` devices with
    examples are left out.
    """
    full = [name for who in sides.values() for name in who if tallies[name].rows]
    held = set(full)
    spread, left_out = {}, {}
    for side, who in {"all": full, **sides}.items():
        mine = [name for name in who if name in held]
        if len(mine) >= least:
            spread[side] = over_devices(tallies, mine)
        elif mine:
            left_out[side] = f"{_devices(len(mine))}, {_few(least)}"
    for label in sorted({label for name in full for label in labels.get(name, {})}):
        values: dict[str, list[str]] = {}
        for name in full:
            values.setdefault(labels.get(name, {}).get(label, ""), []).append(name)
        kept = [value for value in shown(values, least) if value]
        for value in sorted(kept):
            spread[f"{label}={value}"] = over_devices(tallies, values[value])
        hidden = len(values.keys() - {"", *kept})
        if hidden:
            left_out[label] = (
                f"{hidden} of {len(values.keys() - {''})} values are of cohorts that are small, "
                f"{_few(least)}, or would let a small one be worked out"
            )
    return {"spread": spread, "spread_left_out": left_out}


def _devices(count: int) -> str:
    return f"{count} {'device' if count == 1 else 'devices'}"


def _few(least: int) -> str:
    return f"fewer than cohort.min_devices = {least}"
