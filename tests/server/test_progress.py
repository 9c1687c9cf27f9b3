"""Where a run stands, counted from its rounds."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation import plan as plans
from atoll.server.progress import asked, latest, standing, time_left

PLAN = plans.loads('name = "n"\ntask = "t"\nmodel = "m"\nrounds = 5\n')
SAMPLED = msgspec.structs.replace(PLAN, cohort=plans.Cohort(sampling_rate=0.5))

KINDS = {
    "trained": {"survivors": ["a", "b"], "dropped": {"c": "late"}, "lost": False},
    "thrown away": {"survivors": [], "dropped": {"a": "late"}, "lost": False},
    "lost": {"survivors": [], "dropped": {"a": "why"}, "lost": True},
}


def rounds(*kinds, seconds=2.0):
    return [KINDS[kind] | {"seconds": 0.0 if kind == "lost" else seconds} for kind in kinds]


def test_a_lost_round_is_made_up_for_and_one_thrown_away_is_not():
    where = standing(PLAN, rounds("trained", "lost", "thrown away", "trained"))
    assert (where.trained, where.thrown_away, where.lost) == (2, 1, 1)
    assert (where.done, where.now, where.to_come) == (3, 4, 2)
    assert str(where) == "2 of 5 rounds, 1 thrown away, 1 lost"


def test_a_plan_that_samples_makes_up_for_no_round():
    where = standing(SAMPLED, rounds("trained", "lost"))
    assert where.to_come == 3


@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=30))
def test_never_more_rounds_than_planned_are_told_of_a_run_that_went_its_way(kinds):
    """However rounds end, a run goes on until as many as planned are over, and no longer."""
    gone: list[str] = []
    for kind in kinds:
        if standing(PLAN, rounds(*gone)).to_come == 0:
            break
        gone.append(kind)
    where = standing(PLAN, rounds(*gone))
    assert where.done <= PLAN.rounds
    assert where.done + where.to_come == PLAN.rounds
    assert where.trained + where.thrown_away + where.lost == len(gone)


def test_a_plan_that_cannot_be_read_still_counts():
    where = standing(None, rounds("trained", "trained"))
    assert (where.planned, where.to_come, str(where)) == (None, None, "2 rounds")
    assert time_left(rounds("trained"), where.to_come) is None


def test_time_left_leaves_lost_rounds_out_and_counts_what_evaluating_took():
    assert time_left([], 3) is None
    assert time_left(rounds("lost"), 3) is None
    assert time_left(rounds("trained", "lost", "thrown away"), 3) == 6.0
    evaluated = [one | {"evaluate_seconds": 1.0} for one in rounds("trained")]
    assert time_left(evaluated + rounds("trained"), 4) == 10.0


def test_the_newest_known_value_is_told():
    told = [{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": None}, {}]
    assert latest(told, "accuracy") == 0.75
    assert latest([], "accuracy") is None


def test_rounds_from_before_the_draw_was_stored_asked_those_they_name():
    assert asked(KINDS["trained"]) == 3
    assert asked(KINDS["trained"] | {"drawn": 8}) == 8
