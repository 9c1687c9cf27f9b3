"""A plan's rounds on many simulated devices, in this process.

    run(plan, simulated, cohort, on_round) -> Ended

A round is a real one without its messages: the ledger is charged, a cohort drawn, each device
of it trains on its own examples and encodes its update with the plan's clipping, weight, riders
and share of the noise; the integers are added up, released, decoded, and the hub takes its
step. Each rule is the one that hub and devices use (:mod:`atoll.privacy.update`,
:mod:`atoll.federation.riders`, :mod:`~atoll.federation.release`, :func:`progress.stepped`). What
hides terms on their way (masks, encryption) changes no sum and is left out.

Without noise the result is that of :class:`atoll.federation.engine.InProcessGrid` with the same
seed, run name and cohort, up to the float32 additions of :mod:`atoll.federation.batched`. All
draws, noise included, come from the seed, so a simulation can be replayed and protects nobody.

Nothing is kept per device: memory depends on the model and on what is trained at once, never
on how many devices there are. Control variates are the exception: one vector for each device that
has taken part.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from atoll.federation import layout, parameters, progress, training
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.errors import RoundFailed
from atoll.federation.layout import Layout
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.privacy.errors import BudgetExceeded
from atoll.privacy.keystream import Keystream
from atoll.privacy.ledger import Ledger, MemoryStore
from atoll.simulations import simulable
from atoll.simulations.cohorts import cost, drawn
from atoll.simulations.evaluation import accuracy
from atoll.simulations.learning import Crew, Devices
from atoll.simulations.populations import Simulated
from atoll.simulations.trainers import Engine, trainer_of

RUN: Final = "simulation"
HUB: Final = "hub"
"""Whom the hub's draws are seeded for; no device has this name."""
EVERY: Final = 10
"""Rounds from one evaluation to the next, unless the plan says; the last is followed by one."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round as it went: of ``drawn`` devices ``survivors`` are in the sum.

    ``survivors`` is 0 when the round was thrown away, and ``loss`` none. ``accuracy`` is none
    in rounds that were not followed by an evaluation. ``seconds`` leave the evaluation out.
    """

    round: int
    seconds: float
    drawn: int
    survivors: int
    loss: float | None
    epsilon: float | None
    clip_norm: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Ended:
    """Where a simulation ended: float32 weights ``(n,)``; how many rounds are in them.

    ``engine`` says how devices trained: ``batched``, or ``one by one`` for ``reason``.
    """

    weights: Vector
    rounds: int
    ended: Literal["complete", "budget"]
    accuracy: float
    engine: Engine
    reason: str
    beside: int
    """Bytes that worker processes took at most, what they share with this one left out."""


def run(
    plan: Plan,
    simulated: Simulated,
    cohort: int | None,
    on_round: Callable[[Round], None],
    *,
    name: str = RUN,
    every: int = EVERY,
    start: Checkpoint | None = None,
    carried: dict[int, Vector] | None = None,
    keep: Callable[[Checkpoint, Round], None] | None = None,
    workers: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Ended:
    """Run the plan's rounds on ``simulated`` devices.

    ``name`` is the run's, from which devices' seeds come. A round's cohort is drawn as the plan
    says; ``cohort`` sets a fixed number of devices, each
    such set as likely, for a plan without a sampling rate. ``on_round`` hears of every round.
    ``keep`` gets the state after each, from which another run of the same goes on as its
    ``start`` and comes to the same end; ``carried`` is what devices carry by then, changed in
    place (:mod:`atoll.simulations.resumable`). So many ``workers`` train at once, if there is more
    than one to be trained by (:mod:`atoll.simulations.workers`); the result is the same.

    Raises :class:`BadPlan` for what cannot be simulated,
    :class:`atoll.privacy.errors.BadParameters` for a plan that cannot be private or decoded,
    and :class:`RoundFailed` when updates diverge round after round.
    """
    task, population = simulated
    shape = layout.of(task, plan.seed, plan.layers)
    initial = shape.initial
    simulable.check(plan, population.size, cohort, len(initial))
    trainer, trained = trainer_of(task, plan), shape.travelling(parameters.mask(shape.model))
    own = {} if carried is None else carried
    devices = Devices(plan, population, cohort, trainer, name, trained, own)
    with devices.crew(len(initial), workers) as crew:
        state = start or Checkpoint.fresh(name, initial)
        return _rounds(devices, crew, shape, state, on_round, every, keep, clock)


def _rounds(
    devices: Devices,
    crew: Crew,
    shape: Layout,
    state: Checkpoint,
    on_round: Callable[[Round], None],
    every: int,
    keep: Callable[[Checkpoint, Round], None] | None,
    clock: Callable[[], float],
) -> Ended:
    """Run the rounds from ``state`` on."""
    plan, population, cohort, name = devices.plan, devices.population, devices.cohort, devices.run
    model, running = shape.model, shape.running
    failures = 0
    ledger = Ledger(MemoryStore(), plan.model, plan.privacy.budget_epsilon, plan.privacy.delta)
    event = cost(plan, population.size, cohort)
    for past in range(1, state.ended + 1):
        ledger.charge(f"{name}/{past}", event)
    ended: Literal["complete", "budget"] = "complete"
    for number in range(state.ended + 1, plan.rounds + 1):
        began = clock()
        try:
            spent = ledger.charge(f"{name}/{number}", event).epsilon_pld
        except BudgetExceeded:
            ended = "budget"
            break
        state = replace(state, begun=number)
        # Each round has a stream of its own, so that no round needs those before it drawn again.
        entropy = Keystream.replayable(training.local_seed(plan.seed, name, number, HUB))
        clip_norm = state.clip_norm or plan.privacy.clip_norm
        asked = drawn(plan, population.size, cohort, entropy)
        heard = devices.learn(number, state.weights, clip_norm, asked, entropy, state.control, crew)
        if heard.learned is not None:
            failures = 0
            state = progress.stepped(state, heard.learned, plan, running)
        elif len(asked) >= plan.cohort.min_devices:
            failures += 1
        seconds = clock() - began
        looked = number % (plan.evaluate_every or every) == 0 and number < plan.rounds
        done = Round(
            round=number,
            seconds=seconds,
            drawn=len(asked),
            survivors=heard.survivors,
            loss=heard.loss,
            epsilon=spent if math.isfinite(spent) else None,
            clip_norm=clip_norm,
            accuracy=accuracy(model, shape.whole(state.result), population) if looked else None,
        )
        state = replace(state, ended=number)
        if keep:
            keep(state, done)
        on_round(done)
        if failures == progress.PATIENCE:
            raise RoundFailed(
                f"{failures} rounds in a row were thrown away: the updates of too many devices "
                "diverged; lower training.learning_rate"
            )
    return Ended(
        state.result,
        state.trained,
        ended,
        accuracy(model, shape.whole(state.result), population),
        devices.trainer.engine,
        devices.trainer.reason,
        crew.peak(),
    )
