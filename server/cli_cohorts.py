"""What ``atoll plan show`` tells of a run's cohorts and groups, as tables."""

from collections.abc import Mapping
from typing import Any

from atoll.server.fairness_terms import MEASURES
from atoll.server.tables import clean, put, put_table


def put_cohorts(metrics: Mapping[str, Any]) -> None:
    """Print who was left out, accuracy over devices and fairness between groups, where known."""
    for device, why in (metrics.get("cohort") or {}).get("left_out", {}).items():
        put(f"Left out: {clean(device)} ({clean(why)}).")
    if turns := metrics.get("turns"):
        put(f"Asked to train: each in {turns['fewest']} to {turns['most']} rounds.")
    if found := metrics.get("spread"):
        put("")
        _put_spread(found)
    for what, why in (metrics.get("spread_left_out") or {}).items():
        put(f"Not shown: {clean(what)} ({why}).")
    if fair := metrics.get("fairness"):
        put("")
        _put_fairness(fair)


def _put_spread(found: Mapping[str, Mapping[str, float]]) -> None:
    columns = ["Accuracy of", "Devices", "Examples", "All", "Mean", "Std", "Worst", "Tenth", "Best"]
    shares = ("accuracy", "mean", "std", "worst", "worst_tenth", "best")
    put_table(
        columns,
        [
            [name, by["devices"], by["rows"], *(f"{by[share]:.1%}" for share in shares)]
            for name, by in found.items()
        ],
        "",
    )


def _put_fairness(fair: Mapping[str, Any]) -> None:
    put_table(
        ["Group", "Devices", "Examples", "Accuracy"],
        [
            [name, by["devices"], by["rows"], f"{by['accuracy']:.1%}"]
            for name, by in fair["groups"].items()
        ],
        "No group of examples can be shown.",
    )
    known = {name: words for name, words in MEASURES.items() if name in fair}
    if known:
        put("")
        put_table(
            ["Between groups", "Worst class", "Mean"],
            [
                [words, f"{fair[name]:.3f}", f"{fair[f'{name}_mean']:.3f}"]
                for name, words in known.items()
            ],
            "",
        )
    for name, why in fair["left_out"].items():
        put(f"Not shown: {name} ({why}).")
