"""What a device is told in a round: how to train, and its part of the sum."""

from atoll.federation import control, layout, messages, parameters
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.riders import Riders
from atoll.federation.run import Run
from atoll.privacy.sums import Ask, SumSpec
from atoll.privacy.update import UpdateSpec


def training(run: Run, state: Checkpoint, spec: UpdateSpec) -> messages.TrainAsk:
    """Return the instruction to train on the weights of ``state``, one for all devices."""
    plan, riders = run.plan, Riders.of(run.plan)
    examples = plan.privacy.examples
    weights, downlink = parameters.downlink(state.weights, plan.codec.downlink)
    return messages.TrainAsk(
        task=plan.task,
        weights=weights,
        seed=plan.seed,
        local_epochs=plan.training.local_epochs,
        batch_size=plan.training.batch_size,
        learning_rate=plan.training.learning_rate,
        momentum=plan.training.momentum,
        clip_norm=spec.clip_norm,
        bits=spec.bits,
        noise_multiplier=spec.noise_multiplier,
        colluders=spec.colluders,
        noise=spec.placement,
        weight_cap=riders.weight_cap,
        clip_quantile=riders.clip_quantile,
        rider_noise_multiplier=spec.rider_noise_multiplier,
        example_steps=examples.steps if examples else 0,
        example_noise_multiplier=examples.noise_multiplier if examples else 0.0,
        example_clip_norm=examples.clip_norm if examples else 0.0,
        example_sampling_rate=examples.sampling_rate if examples else 0.0,
        proximal=plan.training.proximal,
        most_steps=riders.most_steps,
        layers=layout.encode(plan.layers),
        frozen=run.frozen,
        codec=plan.codec.kind,
        codec_share=plan.codec.share or 1.0,
        feedback=plan.codec.feedback,
        downlink=downlink,
        seconds=plan.training.deadline or 0.0,
        control=parameters.to_bytes(state.control),
        control_scale=control.scale(plan.training),
        control_retained=control.retained(plan),
    )


def term(run: Run, state: Checkpoint, sums: SumSpec, ask: Ask, device: str) -> messages.SumAsk:
    """Return what ``device`` is asked in a phase of a sum, and which term of its counted last."""
    return messages.SumAsk(
        mode=run.plan.privacy.mode,
        phase=ask.phase,
        payload=ask.payloads[device],
        party=device,
        run=sums.key.run,
        round=sums.key.round,
        length=sums.length,
        bound=sums.bound,
        parties=sums.parties,
        min_survivors=run.plan.cohort.min_devices,
        counted=state.counted.get(device, 0),
    )
