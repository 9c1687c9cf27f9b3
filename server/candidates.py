"""The bundle that a run leaves to be signed: model, profile, golden check, card.

Nothing in it comes from a row of data. Golden inputs are synthetic, drawn from the reference
profile; what they must give comes from the float model, and how far the int8 model may be off
is measured on this machine and doubled, because another processor adds up in another order.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from atoll.federation import strategies
from atoll.federation.plan import Plan
from atoll.federation.task import Task
from atoll.fleet import bundle as bundles
from atoll.fleet import profile as profiles
from atoll.fleet.bundle import Golden, Manifest
from atoll.fleet.profile import Profile
from atoll.server import export, model_card
from atoll.server.policy import Verdict

GOLDEN_INPUTS: Final = 16
_CANDIDATES: Final = 4 * GOLDEN_INPUTS
_SLACK: Final = 2.0
_LEAST_TOLERANCE: Final = 0.01
"""Of the outputs' spread: what an exact model may differ by on another processor."""
_NOT_SHIPPED: Final = {"rounds", "turns", "by_device", "cohort"}
"""Facts of a run that stay at the hub."""


class Check(NamedTuple):
    """The golden examples and how this machine's int8 model does on them.

    ``worst`` is its largest difference of any logit; ``spread`` the range of the logits.
    """

    golden: Golden
    worst: float
    spread: float

    def facts(self) -> dict[str, float]:
        """Return what the gates look at."""
        return {
            "worst": self.worst,
            "tolerance": self.golden.tolerance,
            "spread": self.spread,
        }


def golden_check(
    profile: Profile, shape: tuple[int, ...], exact: bytes, shipped: bytes, run: str
) -> Check:
    """Make the golden examples of a run; the same run and models give the same ones.

    ``exact`` is the float model and ``shipped`` the int8 one, both ONNX. Synthetic inputs are
    wilder than real ones and some drive activations out of their int8 range, where any answer
    is far off; of more than are needed, those are kept on which the two models agree best, so
    that the check can be narrow.
    """
    seed = int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    inputs = profiles.synthesise(profile, shape, _CANDIDATES, rng)
    expected = export.outputs(exact, inputs)
    off = np.abs(export.outputs(shipped, inputs) - expected).max(axis=1)
    kept = np.sort(np.argsort(off, kind="stable")[:GOLDEN_INPUTS])
    inputs, expected, worst = inputs[kept], expected[kept], float(off[kept].max())
    spread = float(np.ptp(expected))
    tolerance = max(_SLACK * worst, _LEAST_TOLERANCE * spread)
    return Check(Golden(inputs, expected, tolerance), worst, spread)


def write(
    out: Path,
    *,
    plan: Plan,
    task: Task,
    run: str,
    created: float,
    model: bytes,
    profile: Profile,
    golden: Golden,
    facts: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    weights: Mapping[str, str],
) -> Manifest:
    """Write the bundle to ``out`` and return its manifest; ``created`` is in Unix seconds.

    ``weights`` are the digests of those that the run began and ended with, ``in`` and ``out``.
    """
    manifest = Manifest(
        model=plan.model,
        task=plan.task,
        run=run,
        created=created,
        input=bundles.Input(export.INPUT, task.input_shape),
        output=bundles.Output(export.OUTPUT),
        classes=task.classes,
        channels=task.channels,
        # How long rounds took and what they sent would tell how many took part in them; and what
        # goes to every device tells of no single one.
        metrics=_numbers({name: it for name, it in facts.items() if name not in _NOT_SHIPPED}),
        telemetry_noise=plan.privacy.telemetry_noise,
    )
    return bundles.write(
        out,
        manifest,
        {
            bundles.MODEL: model,
            bundles.PROFILE: profile.encode(),
            bundles.GOLDEN: bundles.encode_golden(golden),
            bundles.CARD: card(manifest, plan, facts, verdicts, weights).encode(),
        },
    )


def card(
    manifest: Manifest,
    plan: Plan,
    facts: Mapping[str, Any],
    verdicts: Sequence[Verdict],
    weights: Mapping[str, str],
) -> str:
    """Return the model card, Markdown (after Mitchell et al., "Model Cards", 2019)."""
    privacy = plan.privacy
    accuracy = [
        f"| {who} | {found['float']:.1%} | {found['int8']:.1%} | {facts['rows'][who]} |"
        for who, found in facts["accuracy"].items()
    ]
    spent = facts["privacy"].get("epsilon")
    epsilon = "no noise was added, so there is no ε" if spent is None else f"ε = {spent:,.1f}"
    counted = (
        f"with Gaussian noise of {privacy.telemetry_noise:g} times what one served row changes"
        if privacy.telemetry_noise
        else "without noise"
    )
    gates = [f"- {verdict.name}: passed, by `{verdict.rule}`" for verdict in verdicts]
    rule = plan.aggregation
    against = (
        f"; combined by `{rule.rule}` against {rule.byzantine} lying "
        f"{'device' if rule.byzantine == 1 else 'devices'} a round"
        if rule.rule != "mean"
        else ""
    )
    return "\n".join(
        [
            f"# {manifest.model}, from run {manifest.run}",
            "",
            (
                f"Task `{manifest.task}`: input {manifest.input.dtype} "
                f"{list(manifest.input.shape)} ({', '.join(manifest.channels)}), "
                f"{len(manifest.classes)} classes ({', '.join(manifest.classes)})."
            ),
            "",
            "## Training",
            (
                f"{strategies.title(plan)}, {facts['rounds']['trained']} rounds, "
                f"{facts['devices']['trainers']} devices; the data stayed on them. "
                f"{_part(facts.get('layers', {}))}"
                f"Sums in mode `{privacy.mode}`, updates clipped to an L2 norm of "
                f"{_clipped(plan, facts)}, noise multiplier {privacy.noise_multiplier:g}{against}."
            ),
            "",
            *model_card.mean(plan),
            (
                f"Privacy spent so far, by the ledger that this run was charged to: {epsilon} at "
                f"δ = {privacy.delta:g}. ε speaks of the trained model alone: evaluation counts, "
                "activation ranges and the reference profile are sums over devices, without noise."
            ),
            "",
            f"A device that serves the model counts what it serves and ships the counts {counted}.",
            "",
            "## Accuracy on held-back data of the devices",
            "| devices | float | int8 (shipped) | examples |",
            "|---|---|---|---|",
            *accuracy,
            "",
            '"Known" devices trained the model; "unseen" ones did not.',
            "",
            *model_card.spread(facts),
            *model_card.fairness(facts),
            "## Gates",
            *gates,
            "",
            "## Record",
            (
                f"The run's record (`atoll plan record {manifest.run}` at a hub, "
                f"`runs/{manifest.run}/record.json` in the directory of a run without one) tells "
                "the plan, what code ran, what was charged, and the digests of what came in and "
                "out. SHA-256 of the "
                f"float32 weights that training began with: `{weights['in']}`, and that it ended "
                f"with: `{weights['out']}`."
            ),
            "",
            "## Limits",
            (
                "Accuracy is that of the devices of this fleet, at the time of the run. What "
                "differs from the reference profile is outside of what was evaluated; that is "
                "what drift alerts are for."
            ),
            "",
        ]
    )


def _clipped(plan: Plan, facts: Mapping[str, Any]) -> str:
    """Say which clipping norm was used: of one that adapts, the last and the first."""
    first, last = plan.privacy.clip_norm, facts["privacy"].get("clip_norm")
    return f"{first:g}" if last is None else f"{last:.4g} in the last round, adapted from {first:g}"


def _part(layers: Mapping[str, int]) -> str:
    """Say how much of the model was trained, where that is not all."""
    if not layers.get("frozen"):
        return ""
    return (
        f"Trained were {layers['travelling']:,} weights, those of adapters merged into the layers; "
        f"{layers['frozen']:,} are as the task has them. "
    )


def _numbers(facts: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers among the facts, named by their path."""
    flat: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and np.isfinite(value):
            flat[prefix + name] = float(value)
    return flat
