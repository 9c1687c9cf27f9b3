"""What refuses a plan as a whole: fields of one section against those of another.

A check is given the sections that it looks at and raises :class:`ValueError`, with the fields
named in full, as they stand in the file, and what to do. What a section's own fields say against
one another it refuses itself (:mod:`atoll.federation.plan_training`,
:mod:`~atoll.federation.plan_rounds`). What depends on how many devices there are, or on the
model, is for :mod:`~atoll.federation.release` and :mod:`~atoll.federation.layout`.
"""

from atoll.federation.plan_rounds import Aggregation, Asynchrony, Cohort, Privacy
from atoll.federation.plan_training import Codec, Layers, Training
from atoll.federation.rule import needed


def check_privacy(privacy: Privacy, cohort: Cohort, training: Training, layers: Layers) -> None:
    """Refuse noise that nobody would add, and what noise has no hold on."""
    if privacy.colluders >= cohort.min_devices:
        raise ValueError(
            f"privacy.colluders = {privacy.colluders} must be below cohort.min_devices = "
            f"{cohort.min_devices}: nobody would be left to add noise; raise cohort.min_devices"
        )
    if training.step_cap is not None and privacy.examples is not None:
        raise ValueError(
            "training.step_cap evens out devices of unequal steps, and under "
            "[privacy.examples] all take privacy.examples.steps: leave training.step_cap out"
        )
    if training.deadline is not None and privacy.examples is not None:
        raise ValueError(
            "training.deadline ends local epochs, and under [privacy.examples] a device "
            "takes privacy.examples.steps: leave training.deadline out"
        )
    if layers.fine_tune and (privacy.noise_multiplier or privacy.examples):
        noise = "privacy.noise_multiplier" if privacy.noise_multiplier else "[privacy.examples]"
        raise ValueError(
            "layers.fine_tune tells how a model does that was tuned on a device's examples, "
            f"without noise and off the ledger: leave it out, or {noise}"
        )


def check_rule(
    aggregation: Aggregation, cohort: Cohort, privacy: Privacy, training: Training
) -> None:
    """Refuse a robust rule where it sees no updates, or where its result would be another's."""
    if aggregation.rule == "mean":
        return
    least = cohort.min_devices
    rule = f'aggregation.rule = "{aggregation.rule}"'
    if privacy.mode != "plain":
        raise ValueError(
            f'{rule} looks at every update, and with privacy.mode = "{privacy.mode}" the hub sees '
            'none: use privacy.mode = "plain", where devices allow it, or leave the rule out'
        )
    if privacy.noise_multiplier:
        raise ValueError(
            f"{rule} with privacy.noise_multiplier = {privacy.noise_multiplier:g}: that noise is "
            "calibrated for a mean, and one device may move this rule's result further; "
            "set privacy.noise_multiplier = 0, or leave the rule out"
        )
    taken = {
        'privacy.clip = "adaptive"': privacy.clip != "fixed",
        'training.weighting = "capped"': training.weighting != "equal",
        "training.step_cap": training.step_cap is not None,
        "training.control_steps": training.control_steps is not None,
    }
    for name, used in taken.items():
        if used:
            raise ValueError(f"{rule} takes every device for one: leave {name} out, or the rule")
    fewest = needed(aggregation.rule, aggregation.byzantine)
    if least < fewest:
        raise ValueError(
            f"{rule} against {aggregation.byzantine} lying devices needs {fewest} updates or "
            f"more: raise cohort.min_devices (now {least}) or lower aggregation.byzantine"
        )
    trim = aggregation.trim
    if trim is not None and trim * least + 1e-9 < aggregation.byzantine:
        raise ValueError(
            f"aggregation.trim = {trim:g} of {least} devices is less than the "
            f"{aggregation.byzantine} that may lie: raise aggregation.trim or cohort.min_devices"
        )


def check_codec(
    codec: Codec, aggregation: Aggregation, privacy: Privacy, training: Training
) -> None:
    """Refuse a codec where it would tell too much, save nothing, or lose what it keeps."""
    if codec.kind == "none":
        return
    top, kind = codec.kind == "top-k", f'codec.kind = "{codec.kind}"'
    if training.control_steps is not None:
        raise ValueError(
            f"{kind} with training.control_steps: control variates are means of whole gradients; "
            "leave one of them out"
        )
    if top and privacy.mode != "plain":
        raise ValueError(
            f'{kind} with privacy.mode = "{privacy.mode}": which coordinates a device sends '
            "tells of its data, and masked or encrypted terms all have the model's length; use "
            'codec.kind = "random-mask", or privacy.mode = "plain", where devices allow it'
        )
    if top and privacy.noise_multiplier and privacy.noise == "distributed":
        raise ValueError(
            f'{kind} with privacy.noise = "distributed": that noise falls on every coordinate, '
            'and then all would be sent; use privacy.noise = "central", or '
            'codec.kind = "random-mask"'
        )
    if aggregation.rule != "mean" and (top or codec.feedback):
        raise ValueError(
            f'aggregation.rule = "{aggregation.rule}" leaves updates out, and no device learns '
            'whether its own: use codec.kind = "random-mask" without codec.error_feedback'
        )


def check_asynchrony(
    asynchrony: Asynchrony | None,
    aggregation: Aggregation,
    cohort: Cohort,
    privacy: Privacy,
    training: Training,
    codec: Codec,
) -> None:
    """Refuse what needs a cohort, or one version of everything that devices are told."""
    if asynchrony is None:
        return
    if privacy.mode != "plain":
        raise ValueError(
            f'[asynchrony] folds updates in one by one, and privacy.mode = "{privacy.mode}" opens '
            'the sum of a cohort that is known before: use privacy.mode = "plain", where devices '
            "allow it, or leave [asynchrony] out"
        )
    if privacy.noise_multiplier and privacy.noise != "central":
        raise ValueError(
            "[asynchrony] weighs updates after devices have sent them, their noise too, which "
            'would then be less than accounted for: use privacy.noise = "central", or '
            "privacy.noise_multiplier = 0"
        )
    kept_out = {
        "aggregation.rule": aggregation.rule != "mean",
        "cohort.size": cohort.size is not None,
        "cohort.enough": cohort.enough is not None,
        "cohort.sampling_rate": cohort.sampling_rate is not None,
        'privacy.clip = "adaptive"': privacy.clip != "fixed",
        "training.control_steps": training.control_steps is not None,
        # Masks are a round's, and the hub's weight leaves a part that no device would keep.
        "codec.kind": codec.kind != "none",
    }
    for name, used in kept_out.items():
        if used:
            raise ValueError(f"{name} is for rounds: leave it out, or [asynchrony]")
    if asynchrony.buffer < cohort.min_devices:
        raise ValueError(
            f"asynchrony.buffer = {asynchrony.buffer} is below cohort.min_devices = "
            f"{cohort.min_devices}: raise asynchrony.buffer, or lower cohort.min_devices"
        )
