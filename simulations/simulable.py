"""What can be simulated at all: the fields of a plan that are heeded, and cohorts that can be.

Another field must have its default: a simulation that passed over it would tell of another run.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from atoll.federation import release
from atoll.federation.errors import BadPlan
from atoll.federation.plan import Codec, Cohort, Layers, Plan, Privacy
from atoll.privacy import modes

_HEEDED: Final = {
    Plan: {
        *("name", "task", "model", "rounds", "evaluate_every", "seed"),
        *("training", "cohort", "privacy", "gates", "layers", "codec"),
    },
    Cohort: {"labels", "min_devices", "round_timeout", "sampling_rate"},
    Privacy: {
        *("mode", "clip_norm", "bits", "noise_multiplier", "noise", "colluders", "clip"),
        *("clip_quantile", "clip_rate", "rider_noise_multiplier", "delta", "budget_epsilon"),
        "telemetry_noise",
    },
    Layers: {"trained", "lora_layers", "lora_rank", "lora_alpha"},
    Codec: {"kind", "share", "error_feedback", "downlink"},
}
"""What a simulation knows how to do; another field must have its default."""


def check(plan: Plan, size: int, cohort: int | None, length: int) -> None:
    """Raise :class:`BadPlan` or :class:`BadParameters` for what could not run.

    ``length`` is the number of the model's parameters.
    """
    for name in _unheeded(plan):
        raise BadPlan(f"{name} cannot be simulated; leave it out, or run the plan on devices")
    if plan.codec.feedback:
        raise BadPlan(
            "simulated devices keep nothing, and error feedback is what a device keeps: use "
            'codec.kind = "random-mask" without codec.error_feedback, or run the plan on devices'
        )
    if plan.training.deadline is not None:
        raise BadPlan(
            "simulated devices take no time that a deadline could end; leave training.deadline out"
        )
    if cohort is not None and plan.cohort.sampling_rate is not None:
        raise BadPlan(
            "the plan draws its cohorts by cohort.sampling_rate; leave a fixed size of the "
            "cohort (--cohort) out, or cohort.sampling_rate"
        )
    if cohort is not None and not plan.cohort.min_devices <= cohort <= size:
        raise BadPlan(
            f"a cohort of {cohort} must be at least cohort.min_devices "
            f"({plan.cohort.min_devices}) and at most the {size} devices there are"
        )
    spec = release.update_spec(plan, plan.privacy.clip_norm)
    modes.check(plan.privacy.mode, spec, release.rounded(plan, length), cohort or size)
    in_the_clear = msgspec.structs.replace(plan.privacy, mode="plain")
    release.check_population(msgspec.structs.replace(plan, privacy=in_the_clear), size)


def _unheeded(plan: Plan) -> Iterator[str]:
    """Yield the fields, named in full, that say what a simulation passes over."""
    sections = {
        "": plan,
        "cohort.": plan.cohort,
        "privacy.": plan.privacy,
        "layers.": plan.layers,
        "codec.": plan.codec,
    }
    for section, part in sections.items():
        known = _HEEDED[type(part)]
        for field in msgspec.structs.fields(part):
            made = field.default_factory
            usual = field.default if made is msgspec.NODEFAULT else made()
            value = getattr(part, field.name)
            if field.name not in known and value != usual:
                name = section + field.name
                yield f"[{name}]" if isinstance(value, msgspec.Struct) else name
