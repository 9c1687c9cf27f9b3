"""Sections of the model card: how the mean was made, and how alike devices and groups fare.

Markdown lines. Those on devices and groups are from the facts of :mod:`atoll.server.spread` and
:mod:`atoll.server.fairness`; none where a run knows nothing of the kind.
"""

from collections.abc import Mapping
from typing import Any, Final

from atoll.federation.plan import Plan

MEASURES: Final = {
    "equalised_odds": "equalised odds, difference",
    "equal_opportunity": "equal opportunity, difference",
    "demographic_parity": "demographic parity, difference",
    "demographic_parity_ratio": "demographic parity, ratio",
}


def mean(plan: Plan) -> list[str]:
    """Return what the mean update was made of: noise, weights, what was sent, and averaging."""
    return [*_noise(plan), *_weights(plan), _sent(plan), _averaged(plan), ""]


def _noise(plan: Plan) -> list[str]:
    privacy, least = plan.privacy, plan.cohort.min_devices
    if not privacy.noise_multiplier:
        return []
    if privacy.noise == "central":
        return ["The hub added the noise, to the sum that it had opened."]
    full = f"with the shares of {least}"
    if privacy.colluders:
        full += f", {privacy.colluders} of whom may know theirs"
    return [f"Each device added its share of the noise; it is in full {full}."]


def _weights(plan: Plan) -> list[str]:
    if plan.aggregation.rule != "mean":
        return []
    older = ", and less the older its update was" if plan.asynchrony else ""
    if plan.training.weighting == "equal":
        return [f"Each device counted the same{older}."]
    return [f"A device counted by its examples, up to {plan.training.weight_cap:,}{older}."]


def _sent(plan: Plan) -> str:
    codec = plan.codec
    feedback = "with" if codec.feedback else "without"
    said = (
        "Updates were sent whole"
        if codec.kind == "none"
        else f"Of an update a share of {codec.share:g} was sent (`{codec.kind}`, {feedback} error "
        "feedback)"
    )
    down = (
        "" if codec.downlink == "float32" else f", and weights went to devices as {codec.downlink}"
    )
    return f"{said}{down}."


def _averaged(plan: Plan) -> str:
    last = plan.training.averaged_rounds
    if last == 1:
        return "The weights are those after the last round."
    return f"The weights are the mean of those after each of the last {last} rounds."


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
