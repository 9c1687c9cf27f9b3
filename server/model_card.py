"""The sections of the model card on how alike devices and groups fare.

Markdown lines, from the facts of :mod:`atoll.server.spread` and :mod:`atoll.server.fairness`; none
where a run knows nothing of the kind.
"""

from collections.abc import Mapping
from typing import Any, Final

MEASURES: Final = {
    "equalised_odds": "equalised odds, difference",
    "equal_opportunity": "equal opportunity, difference",
    "demographic_parity": "demographic parity, difference",
    "demographic_parity_ratio": "demographic parity, ratio",
}


def spread(facts: Mapping[str, Any]) -> list[str]:
    """Return the section on accuracy over devices."""
    found = facts.get("spread", {})
    if not found:
        return []
    rows = [
        f"| {cohort} | {by['devices']} | {by['accuracy']:.1%} | {by['mean']:.1%} ± {by['std']:.1%} "
        f"| {by['worst']:.1%} | {by['worst_tenth']:.1%} | {by['best']:.1%} |"
        for cohort, by in found.items()
    ]
    return [
        "## Accuracy over devices",
        "| cohort | devices | all examples | mean ± std | worst | worst tenth | best |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Of the int8 model; `all examples` weighs each of them the same, the rest each device.",
        *(f"Not shown: {what} ({why})." for what, why in facts.get("spread_left_out", {}).items()),
        "",
    ]


def fairness(facts: Mapping[str, Any]) -> list[str]:
    """Return the section on groups of examples."""
    found = facts.get("fairness")
    if found is None:
        return []
    lines = ["## Fairness between groups"]
    if found["groups"]:
        lines += ["| group | devices | examples | accuracy |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {by['devices']} | {by['rows']} | {by['accuracy']:.1%} |"
            for name, by in found["groups"].items()
        ]
        lines.append("")
    known = {name: words for name, words in MEASURES.items() if name in found}
    if known:
        lines += ["| measure | worst class | mean over classes |", "|---|---|---|"]
        lines += [
            f"| {words} | {found[name]:.3f} | {found[f'{name}_mean']:.3f} |"
            for name, words in known.items()
        ]
        lines += [
            "",
            (
                "Each class against the rest, of the int8 model, from counts summed over "
                f"{found['devices']} devices; equalised odds can be told of {found['compared']} of "
                f"{len(found['by_class'])} classes."
            ),
        ]
    else:
        lines.append("Fewer than two groups can be shown, so nothing is compared.")
    lines += [f"Not shown: {name} ({why})." for name, why in found["left_out"].items()]
    return [*lines, ""]
