"""How a run goes on from one round to the next, in rounds and in asynchronous steps alike.

The loops are those of :mod:`atoll.federation.rounds` and :mod:`atoll.federation.buffered`. Between
their rounds a run is a :class:`Checkpoint`; here is what both do with it.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from atoll.federation import interim, release, selection, strategies
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.cohort import await_trainers
from atoll.federation.conversation import Learned
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.run import RoundReport, Run
from atoll.federation.running_statistics import Running
from atoll.privacy import modes
from atoll.privacy.errors import Refused

PATIENCE: Final = 3
"""Rounds in a row that may be thrown away before the run is given up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended: float32 weights ``(n,)`` and how many rounds are in them.

    They are those after the last round, or the mean of those after the last ``averaged``.
    ``turns`` are those of :class:`Checkpoint`.
    """

    weights: Vector
    rounds: int
    ended: Literal["complete", "budget"]
    turns: Mapping[str, int] = field(default_factory=dict)
    averaged: int = 0

    @classmethod
    def of(cls, state: Checkpoint, ended: Literal["complete", "budget"]) -> "Outcome":
        """Return the outcome of a run that ends in ``state``."""
        return cls(state.result, state.trained, ended, state.turns, state.tailed)


def resumed(run: Run, initial: Vector) -> Checkpoint:
    """Return the state that the run goes on from: its checkpoint, or ``initial``.

    Raises :class:`atoll.federation.errors.BadCheckpoint`, and
    :class:`atoll.privacy.errors.BadParameters` for a plan that cannot be private or decoded.
    """
    found = run.checkpoints.load(run.name) if run.checkpoints else None
    if found and found.session:
        # What does not fit is dealt anew by the devices.
        with suppress(Refused):
            run.session.load(found.session)
    state = found or Checkpoint.fresh(run.name, initial)
    plan, trainers = run.plan, len(run.cohort.trainers)
    spec = release.update_spec(plan, state.clip_norm or plan.privacy.clip_norm)
    values, most = release.rounded(plan, len(initial)), release.parties(plan, trainers)
    modes.check(plan.privacy.mode, spec, values, most)
    release.check_population(plan, trainers)
    return state


def saved(run: Run, state: Checkpoint) -> Checkpoint:
    """Save the state, where the run keeps one, and return it."""
    if run.checkpoints:
        run.checkpoints.save(state)
    return state


def given_up(run: Run, state: Checkpoint) -> Checkpoint:
    """Return the state after a round that broke off and is lost, and report the round.

    One more takes its place, but not where cohorts are sampled: there δ counts on no more rounds
    than planned.
    """
    more = run.plan.cohort.sampling_rate is None
    state = saved(run, replace(state, ended=state.begun, lost=state.lost + more))
    why = "the hub's process ended in this round, and it cannot be repeated"
    run.on_round(
        RoundReport(
            round=state.begun,
            seconds=0.0,
            survivors=(),
            dropped=dict.fromkeys(run.cohort.trainers, why),
            loss=None,
            epsilon=None,
            bytes_up=0,
            bytes_down=0,
            clip_norm=state.clip_norm or run.plan.privacy.clip_norm,
            lost=True,
        )
    )
    return state


def gathered(run: Run, hoped: int) -> tuple[list[str], list[str]]:
    """Return the trainers that may train, and those of them that are connected.

    Waits for ``hoped`` of them at most for a round's timeout, and then goes on with whoever is
    there. Raises :class:`atoll.federation.errors.RoundFailed` when these are too few.
    """
    wanted = run.plan.cohort
    allowed = selection.await_allowed(
        run.cohort.trainers,
        selection.judged(wanted.rule, run.left_out),
        least=wanted.min_devices,
        timeout=wanted.round_timeout,
        clock=run.clock,
    )
    present = await_trainers(
        run.grid,
        replace(run.cohort, trainers=allowed),
        least=wanted.min_devices,
        hoped=min(hoped, len(allowed)),
        timeout=wanted.round_timeout,
        clock=run.clock,
    )
    return allowed, present


def stepped(state: Checkpoint, learned: Learned, plan: Plan, running: Running | None) -> Checkpoint:
    """Return the state after the round that has begun, of which ``learned`` came."""
    strategy = strategies.of(plan.training)
    before = state.moments or strategy.init(len(state.weights))
    moments, update = strategy.step(before, learned.mean)
    if running is None:
        weights = state.weights + update
    else:
        weights = running.followed(state.weights, update, learned.mean)
    tail, tailed = state.tail, state.tailed
    if state.begun > plan.rounds + state.lost - plan.training.averaged_rounds:
        tailed += 1
        tail = (tail + (weights - tail) / tailed).astype(np.float32)
    return replace(
        state,
        completed=state.begun,
        trained=state.trained + 1,
        weights=weights.astype(np.float32),
        moments=moments,
        tail=tail,
        tailed=tailed,
        clip_norm=learned.clip_norm,
        control=learned.control,
    )


def tell(run: Run, state: Checkpoint, report: RoundReport) -> None:
    """Report a round, and again with the accuracy after it where the plan asks for that now."""
    run.on_round(report)
    if report.survivors and interim.due(run.plan, state.trained):
        run.on_round(interim.measured(run, report, state.result))
