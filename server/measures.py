"""What evaluations by many devices say together: accuracy by side, precision and device.

A *side* is ``known`` (devices that trained) or ``unseen`` (devices that only evaluated);
accuracy is told for ``all`` of them too. Every example weighs the same, whichever device it is
on. Pure functions over counts.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from atoll.federation.messages import EvaluateReply
from atoll.server.questions import Confusion, Tally

Sides = Mapping[str, Sequence[str]]


def sides_of(trainers: Collection[str], devices: Collection[str]) -> dict[str, list[str]]:
    """Sort ``devices`` into sides; a side that is empty is absent."""
    sides = {
        "known": [name for name in devices if name in trainers],
        "unseen": [name for name in devices if name not in trainers],
    }
    return {side: names for side, names in sides.items() if names}


def _with_all(sides: Sides) -> dict[str, Sequence[str]]:
    return {**sides, "all": [name for who in sides.values() for name in who]}


def total(tallies: Mapping[str, Tally], devices: Collection[str]) -> Tally:
    """Add up the tallies of ``devices``."""
    parts = [tallies[name] for name in devices]
    return Tally(sum(part.correct for part in parts), sum(part.rows for part in parts))


def of_weights(replies: Mapping[str, EvaluateReply], sides: Sides) -> dict[str, Any]:
    """Return accuracy and loss of the float weights, before anything is exported."""
    tallies = {name: Tally(reply.correct, reply.rows) for name, reply in replies.items()}
    return {
        "accuracy": {
            side: {"float": total(tallies, who).accuracy} for side, who in _with_all(sides).items()
        },
        "loss": {
            # fsum, so that the order in which devices answered changes no bit.
            side: math.fsum(replies[name].loss * replies[name].rows for name in who)
            / max(sum(replies[name].rows for name in who), 1)
            for side, who in sides.items()
        },
    }


def of_tuned(replies: Mapping[str, EvaluateReply], sides: Sides) -> dict[str, Any]:
    """Return the accuracy before and after each device fine-tuned; nothing where none did."""
    tuned = {name: reply for name, reply in replies.items() if reply.correct_tuned >= 0}
    there = {side: [name for name in who if name in tuned] for side, who in sides.items()}
    there = {side: who for side, who in there.items() if who}
    before = {name: Tally(reply.correct, reply.rows) for name, reply in tuned.items()}
    after = {name: Tally(reply.correct_tuned, reply.rows) for name, reply in tuned.items()}
    if not there:
        return {}
    return {
        "fine_tuned": {
            side: {"before": total(before, who).accuracy, "after": total(after, who).accuracy}
            for side, who in _with_all(there).items()
        }
    }


def of_models(
    exact: Mapping[str, Confusion], shipped: Mapping[str, Confusion], sides: Sides
) -> dict[str, Any]:
    """Return what the float and the int8 ONNX model did on the same devices."""
    floats = {name: Tally.of(confusion) for name, confusion in exact.items()}
    ints = {name: Tally.of(confusion) for name, confusion in shipped.items()}
    return {
        "accuracy": {
            side: {"float": total(floats, who).accuracy, "int8": total(ints, who).accuracy}
            for side, who in _with_all(sides).items()
        },
        "rows": {side: total(ints, who).rows for side, who in _with_all(sides).items()},
        "confusion": {
            side: np.sum([shipped[name] for name in who], axis=0).tolist()
            for side, who in sides.items()
        },
        "by_device": {
            name: {
                "rows": ints[name].rows,
                "float": floats[name].accuracy,
                "int8": ints[name].accuracy,
            }
            for who in sides.values()
            for name in who
            if ints[name].rows
        },
    }
