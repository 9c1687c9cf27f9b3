"""Federated averaging under a private sum: the rounds of one plan.

    run_rounds(run, initial) -> Outcome

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

from dataclasses import replace

from atoll.federation import progress, selection
from atoll.federation.checkpoints import Checkpoint
from atoll.federation.cohort import draw
from atoll.federation.conversation import Conversation
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.progress import PATIENCE, Outcome
from atoll.federation.run import Run
from atoll.privacy.errors import BudgetExceeded


def run_rounds(run: Run, initial: Vector) -> Outcome:
    """Run the plan's rounds, or those that are left of them after the checkpoint.

    ``initial`` is what travels of the initial weights, float32 ``(n,)``
    (:mod:`atoll.federation.layout`). When ``run.charge`` raises :class:`BudgetExceeded` the run
    ends with what has been trained.

    Raises :class:`RoundFailed` when too few devices are there or answer, :class:`BadPlan`,
    :class:`atoll.privacy.errors.BadParameters` for a plan that cannot be private or decoded,
    and :class:`atoll.federation.errors.BadCheckpoint`.
    """
    plan, least = run.plan, run.plan.cohort.min_devices
    if plan.asynchrony is not None:
        raise BadPlan("a plan with [asynchrony] runs in steps, not in rounds")
    state = progress.resumed(run, initial)
    failures, hoped = 0, len(run.cohort.trainers)
    number, repeated = state.begun + 1, 0
    if state.begun > state.ended and _repeatable(plan):
        number = repeated = state.begun
    elif state.begun > state.ended:
        state = progress.given_up(run, state)
    while number <= plan.rounds + state.lost:
        allowed, present = progress.gathered(run, hoped)
        # At the start everybody is waited for; later whoever is there goes on.
        hoped = least
        try:
            epsilon = run.charge(number, len(present))
        except BudgetExceeded:
            return Outcome.of(state, "budget")
        drawn = _drawn(run, state, number, allowed, present)
        turns = selection.after(state.turns, drawn) if plan.cohort.picks else state.turns
        state = progress.saved(run, replace(state, begun=number, turns=turns))
        talk = Conversation(run, state, drawn, present)
        learned = talk.learn()
        if learned is not None:
            failures = 0
            state = progress.stepped(state, learned, plan, run.running)
            state = replace(state, session=run.session.dump(), counted=talk.counted)
        elif number == repeated:
            state = replace(state, lost=state.lost + 1)
        elif len(drawn) >= least:
            failures += 1
        state = progress.saved(run, replace(state, ended=number))
        lost = learned is None and number == repeated
        progress.tell(run, state, replace(talk.report(epsilon), lost=lost))
        if failures == PATIENCE:
            raise RoundFailed(
                f"{PATIENCE} rounds in a row were thrown away ({talk.why}); "
                "look at why devices drop out, then start the run again"
            )
        number += 1
    return Outcome.of(state, "complete")


def _repeatable(plan: Plan) -> bool:
    """Tell whether the devices of a round that broke off answer the same again, all of them."""
    everybody = plan.cohort.sampling_rate is None and not plan.cohort.picks
    return plan.privacy.mode == "plain" and everybody


def _drawn(
    run: Run, state: Checkpoint, number: int, allowed: list[str], present: list[str]
) -> list[str]:
    """Return the trainers of a round, of those ``allowed``; of these ``present`` are connected."""
    wanted = run.plan.cohort
    if wanted.size is not None:
        lots = selection.lots_of(run.plan.seed, run.name, number)
        return selection.fewest_turns(present, state.turns, wanted.size, lots)
    if wanted.sampling_rate is not None:
        return draw(allowed, wanted.sampling_rate, run.entropy)
    return allowed
