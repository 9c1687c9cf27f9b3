"""What a device makes of one round's instruction: local training, and a term of the sum.

    make(task, data, work, ask, kept) -> (term, loss)

From weights to a change, from the change to integers (:mod:`atoll.privacy.update`), with the
numbers that ride behind it (:mod:`atoll.federation.riders`). Simulations take
:func:`encoded` from here, so that there is one such path.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from atoll.federation import control, messages, parameters, training
from atoll.federation.control import Control
from atoll.federation.errors import BadMessage
from atoll.federation.kept import Carried, Kept
from atoll.federation.parameters import Vector
from atoll.federation.plan import ExamplePrivacy, Training
from atoll.federation.riders import Riders
from atoll.federation.strategies import effective_steps
from atoll.federation.task import Task
from atoll.privacy import update
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import Integers

CONTROL: Final = "control"
"""Under this name a device keeps its control variate."""


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

    ``kept`` is what the device keeps from round to round: its control variate. ``now`` gives
    seconds, for a round that ends local training after so many. Raises
    :class:`atoll.federation.errors.DataMissing`, :class:`BadMessage` and
    :class:`atoll.privacy.errors.BadUpdate`.
    """
    seed = training.local_seed(work.seed, ask.run, ask.round, ask.party)
    before = parameters.from_bytes(work.weights)
    model, examples, how = task.model(0), task.load(data, "train"), training_of(work)
    carried = Carried(kept, ask.run, CONTROL)
    mine = _control(work, carried.as_of(ask.counted, lambda: np.zeros_like(before)), before)
    correction = mine.correction if mine else None
    if work.example_steps:
        # Imported here: it loads Opacus, for which a device without this mode does not pay.
        from atoll.federation import example_privacy

        protected, secret = _example_privacy(work), Keystream.fresh()
        done = example_privacy.train(
            model, before, examples, how, protected, secret, correction=correction
        )
    else:
        ended = _ended(work.seconds, now)
        done = training.train(
            model, before, examples, how, seed, ended=ended, correction=correction
        )
    rows = len(examples.y)
    # Without noise there is nothing to keep secret in the rounding, and a seed makes the run
    # repeatable. With noise, rounding draws from the system's entropy like the noise itself.
    rng = Keystream.fresh() if work.noise_multiplier else Keystream.replayable(seed)
    riders, spec, change = riders_of(work), spec_of(work, ask), done.weights - before
    if mine is None:
        return encoded(change, rows, done.steps, how, riders, spec, rng), done.loss
    sent = mine.sent(change, control.reach(done.steps, how), parameters.mask(model))
    term = encoded(sent, rows, done.steps, how, riders, spec, rng)
    carried.put(ask.round, mine.own, mine.following(update.clipped(sent, spec)))
    return term, done.loss


def encoded(
    change: Vector | npt.NDArray[np.float64],
    rows: int,
    steps: int,
    how: Training,
    riders: Riders,
    spec: update.UpdateSpec,
    rng: Keystream,
) -> Integers:
    """Return the term of a device that came to ``change`` in ``steps`` steps on ``rows`` examples.

    With control variates that is what :meth:`atoll.federation.control.Control.sent` returns.
    Raises :class:`atoll.privacy.errors.BadUpdate` for a change that diverged.
    """
    effective = effective_steps(steps, how) if riders.most_steps else 0.0
    if effective:
        change = change / np.float32(effective)
    behind = riders.values(rows, within=update.norm(change) <= spec.clip_norm, steps=effective)
    return update.encode(change, spec, rng, riders.weight(rows), behind)


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


def _control(work: messages.TrainAsk, own: Vector, before: Vector) -> Control | None:
    if not work.control_scale > 0:
        return None
    shared = parameters.from_bytes(work.control) if work.control else np.zeros_like(before)
    if shared.shape != before.shape:
        raise BadMessage(f"{len(before)} weights with a control variate of {len(shared)}")
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
