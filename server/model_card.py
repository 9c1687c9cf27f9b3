"""The model card: what a person should know before a model is signed, and beside it afterwards.

Markdown, after Mitchell et al., "Model Cards for Model Reporting", 2019. What a run knows nothing
of has no section.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from atoll.federation import strategies
from atoll.federation.plan import Plan
from atoll.fleet.bundle import Manifest
from atoll.server.fairness_terms import MEASURES
from atoll.server.policy import Verdict

Facts = Mapping[str, Any]
"""A run's facts, as the gates see them."""


def written(
    manifest: Manifest,
    plan: Plan,
    facts: Facts,
    verdicts: Sequence[Verdict],
    weights: Mapping[str, str],
) -> str:
    """Return the card of a candidate whose gates gave ``verdicts``.

    ``weights`` are the digests of those that training began and ended with, ``in`` and ``out``.
    """
    return "\n".join(
        [
            *_model(manifest),
            *_training(plan, facts),
            *_accuracy(facts),
            *_spread(facts),
            *_fairness(facts),
            *_gates(verdicts),
            *_record(manifest.run, weights),
            *_limits(),
        ]
    )


def _model(manifest: Manifest) -> list[str]:
    return [
        f"# {manifest.model}, from run {manifest.run}",
        "",
        (
            f"Task `{manifest.task}`: input {manifest.input.dtype} "
            f"{list(manifest.input.shape)} ({', '.join(manifest.channels)}), "
            f"{len(manifest.classes)} classes ({', '.join(manifest.classes)})."
        ),
        "",
    ]


def _training(plan: Plan, facts: Facts) -> list[str]:
    """Return the section on how the model was trained, and what of that is private."""
    privacy, spent = plan.privacy, facts["privacy"].get("epsilon")
    epsilon = "no noise was added, so there is no ε" if spent is None else f"ε = {spent:,.1f}"
    counted = (
        f"with Gaussian noise of {privacy.telemetry_noise:g} times what one served row changes"
        if privacy.telemetry_noise
        else "without noise"
    )
    return [
        "## Training",
        (
            f"{strategies.title(plan)}, {facts['rounds']['trained']} rounds, "
            f"{facts['devices']['trainers']} devices; the data stayed on them. "
            f"{_part(facts.get('layers', {}))}"
            f"Sums in mode `{privacy.mode}`, updates clipped to an L2 norm of "
            f"{_clipped(plan, facts)}, noise multiplier {privacy.noise_multiplier:g}"
            f"{_against(plan)}."
        ),
        "",
        *mean(plan, facts),
        (
            f"Privacy spent so far, by the ledger that this run was charged to: {epsilon} at "
            f"δ = {privacy.delta:g}. ε speaks of the trained model alone: evaluation counts, "
            "activation ranges and the reference profile are sums over devices, without noise."
        ),
        "",
        f"A device that serves the model counts what it serves and ships the counts {counted}.",
        "",
    ]


def mean(plan: Plan, facts: Facts) -> list[str]:
    """Return what the mean update was made of: noise, weights, what was sent, and averaging."""
    return [*_noise(plan), *_weights(plan), _sent(plan), _averaged(facts), ""]


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
        ""
        if codec.downlink == "float32"
        else f", and weights went to devices as {codec.downlink} where it can hold them"
    )
    return f"{said}{down}."


def _averaged(facts: Facts) -> str:
    last = facts["rounds"].get("averaged", 0)
    if last <= 1:
        return "The weights are those after the last round."
    return f"The weights are the mean of those after each of the last {last} rounds."


def _part(layers: Mapping[str, int]) -> str:
    """Say how much of the model was trained, where that is not all."""
    if not layers.get("frozen"):
        return ""
    return (
        f"Trained were {layers['travelling']:,} weights, those of adapters merged into the layers; "
        f"{layers['frozen']:,} are as the task has them. "
    )


def _clipped(plan: Plan, facts: Facts) -> str:
    """Say which clipping norm was used: of one that adapts, the last and the first."""
    first, last = plan.privacy.clip_norm, facts["privacy"].get("clip_norm")
    return f"{first:g}" if last is None else f"{last:.4g} in the last round, adapted from {first:g}"


def _against(plan: Plan) -> str:
    """Say how many lying devices the rule withstands, where updates are not just averaged."""
    asked = plan.aggregation
    if asked.rule == "mean":
        return ""
    lying = "device" if asked.byzantine == 1 else "devices"
    return f"; combined by `{asked.rule}` against {asked.byzantine} lying {lying} a round"


def _accuracy(facts: Facts) -> list[str]:
    rows = [
        f"| {who} | {found['float']:.1%} | {found['int8']:.1%} | {facts['rows'][who]} |"
        for who, found in facts["accuracy"].items()
    ]
    return [
        "## Accuracy on held-back data of the devices",
        "| devices | float | int8 (shipped) | examples |",
        "|---|---|---|---|",
        *rows,
        "",
        '"Known" devices trained the model; "unseen" ones did not.',
        "",
    ]


def _spread(facts: Facts) -> list[str]:
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


def _fairness(facts: Facts) -> list[str]:
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


def _gates(verdicts: Sequence[Verdict]) -> list[str]:
    passed = [f"- {verdict.name}: passed, by `{verdict.rule}`" for verdict in verdicts]
    return ["## Gates", *passed, ""]


def _record(run: str, weights: Mapping[str, str]) -> list[str]:
    return [
        "## Record",
        (
            f"The run's record (`atoll plan record {run}` at a hub, "
            f"`runs/{run}/record.json` in the directory of a run without one) tells "
            "the plan, what code ran, what was charged, and the digests of what came in and "
            "out. SHA-256 of the "
            f"float32 weights that training began with: `{weights['in']}`, and that it ended "
            f"with: `{weights['out']}`."
        ),
        "",
    ]


def _limits() -> list[str]:
    return [
        "## Limits",
        (
            "Accuracy is that of the devices of this fleet, at the time of the run. What "
            "differs from the reference profile is outside of what was evaluated; that is "
            "what drift alerts are for."
        ),
        "",
    ]
