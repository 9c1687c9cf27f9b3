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
            bundles.CARD: model_card.written(manifest, plan, facts, verdicts, weights).encode(),
        },
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
