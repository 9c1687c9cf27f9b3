"""Federated averaging under a private sum: the rounds of one plan.

    run_rounds(grid, plan, cohort, session, charge, on_round, initial, *, run,
               checkpoints=None, clock=SYSTEM_CLOCK, entropy=None, left_out=None) -> Outcome

For each round the ledger is charged first; then the cohort is drawn, and the hub's side of the
sum leads. Phases before the contribution are messages of their own, the contribution rides
with the training instruction, phases after it open the sum. No term weighs more than one, so
that the sum's sensitivity is one device's clipped update. A round with too few survivors is
thrown away: the weights stay, the charge stands, and the next round goes on; :data:`PATIENCE`
of them in a row end the run with :class:`RoundFailed`.

Under ``cohort.sampling_rate`` the draw alone can fall below the minimum. Such a round is
thrown away as well, and charged, because that it was thrown away is seen. But it says nothing
of the devices: the next round draws anew, and it neither adds to :data:`PATIENCE` nor takes
from it. A cohort that was drawn large enough and of which too few are connected, or answer,
does add.

``cohort.rule`` and ``cohort.size`` narrow a round's trainers (:mod:`atoll.federation.selection`):
first to those who may train now, then to those of them who are connected and had the fewest
turns.

A round that broke off, because this process ended in it, is repeated under the charge that it has
where every device answers the same question with the same bytes: in ``plain``, with the whole
cohort. Elsewhere, and where devices no longer remember, it is lost: it stays charged, and one
more round at the end, charged as any other, takes its place if the budget allows and the plan
does not sample its cohorts (ADR 14).

With no noise a run on the in-process engine is repeatable from ``plan.seed``: batch order
and stochastic rounding on a device draw from (seed, round, device). With noise, rounding and
noise draw from the system's entropy, as sampled cohorts always do.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from flwr.serverapp import Grid

from atoll.federation import interim, release, selection, strategies
from atoll.federation.checkpoints import Checkpoint, Checkpoints
from atoll.federation.cohort import Cohort, Member, await_trainers, draw
from atoll.federation.conversation import Conversation, Learned, RoundReport, Setting
from atoll.federation.errors import RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.privacy import modes
from atoll.privacy.errors import BudgetExceeded, Refused
from atoll.privacy.keystream import Keystream
from atoll.privacy.modes import HubSession

__all__ = ["PATIENCE", "Cohort", "Member", "Outcome", "RoundReport", "run_rounds", "stepped"]

PATIENCE: Final = 3
"""Rounds in a row that may be thrown away before the run is given up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a run ended: float32 weights ``(n,)`` and how many rounds are in them.

    ``turns`` are those of :class:`Checkpoint`.
    """

    weights: Vector
    rounds: int
    ended: Literal["complete", "budget"]
    turns: Mapping[str, int] = field(default_factory=dict)


def run_rounds(
    grid: Grid,
    plan: Plan,
    cohort: Cohort,
    session: HubSession,
    charge: Callable[[int, int], float | None],
    on_round: Callable[[RoundReport], None],
    initial: Vector,
    *,
    run: str,
    checkpoints: Checkpoints | None = None,
    clock: Clock = SYSTEM_CLOCK,
    entropy: Keystream | None = None,
    left_out: selection.LeftOut | None = None,
    frozen: str = "",
) -> Outcome:
    """Run the plan's rounds, or those that are left of them after the checkpoint.

    ``run`` names the run to devices and must be the same after a restart. ``charge`` is called
    before a round starts, with its number and that of the trainers that are connected, and
    returns the ε spent so far (none when nothing bounds it); when it raises
    :class:`BudgetExceeded` the run ends with what has been trained. ``on_round`` hears of every
    round, thrown away or not, and again of one after which devices were asked for the accuracy.
    ``entropy`` is what cohorts and the hub's noise are drawn from: a fresh keystream, but for
    tests. ``left_out`` says before each round who may not train; a plan with a ``cohort.rule``
    does not run without. ``initial`` is what travels of the initial weights, ``frozen`` the digest
    of those that nobody trains (:mod:`atoll.federation.layout`).

    Raises :class:`RoundFailed` when too few devices are there or answer, :class:`BadPlan`,
    :class:`atoll.privacy.errors.BadParameters` for a plan that cannot be private or decoded,
    and :class:`atoll.federation.errors.BadCheckpoint`.
    """
    entropy = entropy or Keystream.fresh()
    left_out = selection.judged(plan.cohort.rule, left_out)
    setting = Setting(grid, plan, cohort, run, clock, entropy, frozen)
    state = _resume(run, session, checkpoints) or Checkpoint.fresh(run, initial)
    spec = release.update_spec(plan, state.clip_norm or plan.privacy.clip_norm)
    values = release.rounded(plan, len(initial))
    most = release.parties(plan, len(cohort.trainers))
    modes.check(plan.privacy.mode, spec, values, most)
    release.check_population(plan, len(cohort.trainers))
    rate, least = plan.cohort.sampling_rate, plan.cohort.min_devices
    failures, hoped = 0, len(cohort.trainers)
    number, repeated = state.begun + 1, 0
    everybody = rate is None and not plan.cohort.picks
    if state.begun > state.ended and plan.privacy.mode == "plain" and everybody:
        number = repeated = state.begun
    elif state.begun > state.ended:
        # A sampled plan's δ counts on no more rounds than planned, so there none takes its place.
        state = replace(state, ended=state.begun, lost=state.lost + (rate is None))
        _save(state, checkpoints)
        on_round(broken_off(state, cohort, spec.clip_norm))
    while number <= plan.rounds + state.lost:
        trainers = selection.await_allowed(
            cohort.trainers,
            left_out,
            least=least,
            timeout=plan.cohort.round_timeout,
            clock=clock,
        )
        present = await_trainers(
            grid,
            replace(cohort, trainers=trainers),
            least=least,
            hoped=min(hoped, len(trainers)),
            timeout=plan.cohort.round_timeout,
            clock=clock,
        )
        # At the start everybody is waited for; later whoever is there goes on.
        hoped = least
        try:
            epsilon = charge(number, len(present))
        except BudgetExceeded:
            return Outcome(state.result, state.trained, "budget", state.turns)
        drawn = trainers if rate is None else draw(trainers, rate, entropy)
        if plan.cohort.size is not None:
            lots = selection.lots_of(plan.seed, run, number)
            drawn = selection.fewest_turns(present, state.turns, plan.cohort.size, lots)
        turns = selection.after(state.turns, drawn) if plan.cohort.picks else state.turns
        state = replace(state, begun=number, turns=turns)
        _save(state, checkpoints)
        clip_norm = state.clip_norm or plan.privacy.clip_norm
        talk = Conversation(
            setting,
            number,
            state.weights,
            clip_norm,
            drawn,
            present,
            state.counted,
            state.control,
        )
        learned = talk.learn(session)
        if learned is not None:
            failures = 0
            state = stepped(state, learned, plan)
            state = replace(state, session=session.dump(), counted=talk.counted)
        elif number == repeated:
            state = replace(state, lost=state.lost + 1)
        elif len(drawn) >= least:
            failures += 1
        state = replace(state, ended=number)
        _save(state, checkpoints)
        report = replace(talk.report(epsilon), lost=learned is None and number == repeated)
        on_round(report)
        if learned is not None and interim.due(plan, state.trained):
            on_round(interim.measured(report, setting, state.result))
        if failures == PATIENCE:
            raise RoundFailed(
                f"{PATIENCE} rounds in a row were thrown away ({talk.why}); "
                "look at why devices drop out, then start the run again"
            )
        number += 1
    return Outcome(state.result, state.trained, "complete", state.turns)


def stepped(state: Checkpoint, learned: Learned, plan: Plan) -> Checkpoint:
    """Return the state after the round that has begun, of which ``learned`` came."""
    strategy = strategies.of(plan.training)
    before = state.moments or strategy.init(len(state.weights))
    moments, update = strategy.step(before, learned.mean)
    weights = state.weights + update
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


def broken_off(state: Checkpoint, cohort: Cohort, clip_norm: float) -> RoundReport:
    """Return the report of a round that is lost: nothing is known of it but that it began."""
    why = "the hub's process ended in this round, and it cannot be repeated"
    return RoundReport(
        round=state.begun,
        seconds=0.0,
        survivors=(),
        dropped=dict.fromkeys(cohort.trainers, why),
        loss=None,
        epsilon=None,
        bytes_up=0,
        bytes_down=0,
        clip_norm=clip_norm,
        lost=True,
    )


def _resume(run: str, session: HubSession, checkpoints: Checkpoints | None) -> Checkpoint | None:
    found = checkpoints.load(run) if checkpoints else None
    if found and found.session:
        # What does not fit is dealt anew by the devices.
        with suppress(Refused):
            session.load(found.session)
    return found


def _save(state: Checkpoint, checkpoints: Checkpoints | None) -> None:
    if checkpoints:
        checkpoints.save(state)
