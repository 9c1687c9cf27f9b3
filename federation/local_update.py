"""What a device makes of one round's instruction: local training, and a term of the sum.

    make(task, data, work, ask, kept) -> (term, loss)

From weights to a change, from the change to integers (:mod:`atoll.privacy.update`), with the
numbers that ride behind it (:mod:`atoll.federation.riders`). Simulations take
:func:`encoded` from here, so that there is one such path.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.federation import codec, control, messages, parameters
from atoll.federation.codec import WHOLE, Sketch
from atoll.federation.control import Control
from atoll.federation.errors import BadMessage
from atoll.federation.kept import Carried, Kept
from atoll.federation.parameters import Vector
from atoll.federation.plan import ExamplePrivacy, Training
from atoll.federation.riders import Riders
from atoll.federation.strategies import effective_steps
from atoll.federation.task import Task
from atoll.privacy import update
from atoll.privacy.errors import Refused
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers

CONTROL: Final = "control"
"""Under this name a device keeps its control variate."""
RESIDUAL: Final = "residual"
"""And under this one what it did not send."""


class Encoded(NamedTuple):
    """A device's term, and what it keeps of its change under error feedback."""

    term: Integers
    residual: Vector | None


def make(
    task: Task,
    data: Path,
    work: messages.TrainAsk,
    ask: messages.SumAsk,
    kept: Kept,
    *,
    now: Callable[[], float] = time.monotonic,
) -> tuple[Integers, float]:
    """Return a device's term, int64 ``(length,)``, and its mean loss over the last local epoch.

    ``kept`` is what the device keeps from round to round: its control variate, its own layers, and
    what a codec left out. ``now`` gives seconds, for a round that ends local training after so
    many. Raises :class:`atoll.federation.errors.DataMissing`, :class:`BadMessage`,
    :class:`atoll.federation.errors.BadPlan` for layers that the model lacks, and
    :class:`atoll.privacy.errors.BadUpdate`.
    """
    # Imported here: they load torch, which a device that waits for a round need not hold.
    from atoll.federation import personal, training

    seed = training.local_seed(work.seed, ask.run, ask.round, ask.party)
    before = parameters.from_bytes(work.weights, work.downlink)
    mine = personal.Mine.of(task, work.seed, work.layers, work.frozen, kept, ask.run)
    shape, own = mine.layout, mine.before(ask.round)
    start, model = shape.whole(before, own), shape.model
    examples, how = task.load(data, "train"), training_of(work)
    carried = Carried(kept, ask.run, CONTROL)
    own_variate = carried.as_of(ask.counted, lambda: np.zeros_like(before))
    variates = _control(work, own_variate, before)
    correction = shape.alone(variates.correction) if variates else None
    if work.example_steps:
        # Imported here: it loads Opacus, for which a device without this mode does not pay.
        from atoll.federation import example_privacy

        protected, secret = _example_privacy(work), Keystream.fresh()
        done = example_privacy.train(
            model, start, examples, how, protected, secret, correction=correction
        )
    else:
        ended = _ended(work.seconds, now)
        done = training.train(model, start, examples, how, seed, ended=ended, correction=correction)
    rows = len(examples.y)
    # Without noise there is nothing to keep secret in the rounding, and a seed makes the run
    # repeatable. With noise, rounding draws from the system's entropy like the noise itself.
    rng = Keystream.fresh() if work.noise_multiplier else Keystream.replayable(seed)
    riders, spec = riders_of(work), spec_of(work, ask)
    change = shape.travelling(done.weights) - before
    if variates is not None:
        trained = shape.travelling(parameters.mask(model))
        sent = variates.sent(change, control.reach(done.steps, how), trained)
        made = encoded(sent, rows, done.steps, how, riders, spec, rng)
        mine.keep(ask.round, own, done.weights)
        carried.put(ask.round, variates.own, variates.following(update.clipped(sent, spec)))
        return made.term, done.loss
    residual = Carried(kept, ask.run, RESIDUAL)
    sketch = _sketch(work, ask, len(before), residual)
    made = encoded(change, rows, done.steps, how, riders, spec, rng, sketch)
    mine.keep(ask.round, own, done.weights)
    if sketch.residual is not None and made.residual is not None:
        residual.put(ask.round, sketch.residual, made.residual)
    return made.term, done.loss


def encoded(
    change: Vector | npt.NDArray[np.float64],
    rows: int,
    steps: int,
    how: Training,
    riders: Riders,
    spec: update.UpdateSpec,
    rng: Keystream,
    sketch: Sketch = WHOLE,
) -> Encoded:
    """Return what a device sends that came to ``change`` in ``steps`` steps on ``rows`` examples.

    With control variates that is what :meth:`atoll.federation.control.Control.sent` returns.
    Raises :class:`atoll.privacy.errors.BadUpdate` for a change that diverged.
    """
    effective = effective_steps(steps, how) if riders.most_steps else 0.0
    if effective:
        change = change / np.float32(effective)
    chosen, weight = sketch.chosen(change), riders.weight(rows)
    # A pass over the update, which adaptive clipping alone asks for.
    within = not riders.clip_quantile or update.norm(chosen.values) <= spec.clip_norm
    behind = riders.values(rows, within=within, steps=effective)
    clipped = update.quantise(chosen.values, spec, rng, weight, behind)
    noised = update.noised(clipped, spec, rng)
    return Encoded(
        sketch.term(chosen, noised, spec.riders), sketch.left(chosen, clipped, spec, weight)
    )


def training_of(work: messages.TrainAsk) -> Training:
    """Return how the device is to train."""
    return Training(
        local_epochs=work.local_epochs,
        batch_size=work.batch_size,
        learning_rate=work.learning_rate,
        momentum=work.momentum,
        proximal=work.proximal,
    )


def riders_of(work: messages.TrainAsk) -> Riders:
    """Return which numbers ride behind the update."""
    return Riders(work.weight_cap, work.clip_quantile, work.most_steps)


def spec_of(work: messages.TrainAsk, ask: messages.SumAsk) -> update.UpdateSpec:
    """Return how this round's update becomes a term."""
    return update.UpdateSpec(
        clip_norm=work.clip_norm,
        bits=work.bits,
        noise_multiplier=work.noise_multiplier,
        # No number of its own: the noise must hold for the fewest that the sum allows.
        survivors=ask.min_survivors,
        colluders=work.colluders,
        placement=work.noise,
        riders=riders_of(work).count,
        rider_noise_multiplier=work.rider_noise_multiplier,
    )


def _sketch(
    work: messages.TrainAsk, ask: messages.SumAsk, length: int, residual: Carried
) -> Sketch:
    """Return this round's codec; what is kept is that of the last round that counted."""
    if not 0 < work.codec_share <= 1:
        raise BadMessage(f"a share of {work.codec_share} of an update cannot be sent")
    if work.codec == "top-k" and ask.mode != "plain":
        raise Refused(f"which coordinates are largest is not said in mode {ask.mode!r}")
    if work.codec == "top-k" and work.noise_multiplier and work.noise == "distributed":
        raise Refused("noise on the largest coordinates alone would not hide which they are")
    places = None
    if work.codec == "random-mask":
        places = codec.mask(length, work.codec_share, work.seed, ask.run, ask.round)
    kept = None
    if work.feedback:
        kept = residual.as_of(ask.counted, lambda: np.zeros(length, np.float32))
        if kept.shape != (length,):
            kept = np.zeros(length, np.float32)
    return Sketch(work.codec, work.codec_share, places, kept)


def _control(work: messages.TrainAsk, own: Vector, before: Vector) -> Control | None:
    if not work.control_scale > 0:
        return None
    shared = parameters.from_bytes(work.control) if work.control else np.zeros_like(before)
    if shared.shape != before.shape:
        raise BadMessage(f"{len(before)} weights with a control variate of {len(shared)}")
    if own.shape != before.shape:
        own = np.zeros_like(before)
    return Control(own, shared, work.control_scale, work.control_retained)


def _ended(seconds: float, now: Callable[[], float]) -> Callable[[], bool]:
    """Return what says whether ``seconds`` have gone by from here; 0 never do."""
    if not seconds:
        return lambda: False
    deadline = now() + seconds
    return lambda: now() >= deadline


def _example_privacy(work: messages.TrainAsk) -> ExamplePrivacy:
    asked = {
        "noise_multiplier": work.example_noise_multiplier,
        "clip_norm": work.example_clip_norm,
        "sampling_rate": work.example_sampling_rate,
        "steps": work.example_steps,
    }
    try:
        return msgspec.convert(asked, ExamplePrivacy)
    except msgspec.ValidationError as error:
        raise BadMessage(f"training that protects no example: {error}") from error
