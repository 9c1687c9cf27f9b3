import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.fleet.twin import (
    Confirm,
    Install,
    Stop,
    outcome,
    reconcile,
    settled,
)
from atoll.fleet.wire import Desired, Reported

wishes = st.tuples(st.sampled_from([None, 1, 2, 3]), st.booleans())


NOTHING_DESIRED = Desired(version=0)
NOTHING_REPORTED = Reported(desired_version=0, model=None, release=None, state="idle")


def _wish(before: Desired, release: int | None, *, train: bool = False) -> Desired:
    model = None if release is None else "m"
    return Desired(version=before.version + 1, model=model, release=release, train=train)


def _follow(desired: Desired, reported: Reported, *, works: bool) -> Reported:
    """Do what :func:`reconcile` says, as an agent would."""
    match reconcile(desired, reported):
        case Install(model, release) if works:
            return Reported(
                desired_version=desired.version, model=model, release=release, state="serving"
            )
        case Install():
            return Reported(
                desired_version=desired.version,
                model=reported.model,
                release=reported.release,
                state="failed",
                error="broken",
            )
        case Stop():
            return Reported(desired_version=desired.version, model=None, release=None, state="idle")
        case Confirm():
            return Reported(
                desired_version=desired.version,
                model=reported.model,
                release=reported.release,
                state="serving" if reported.model else "idle",
            )
        case None:
            return reported


@given(st.lists(st.tuples(wishes, st.booleans())))
def test_one_step_settles_a_device_and_then_it_rests(history) -> None:
    desired, reported = NOTHING_DESIRED, NOTHING_REPORTED
    for (release, train), works in history:
        desired = _wish(desired, release, train=train)
        reported = _follow(desired, reported, works=works)
        assert settled(desired, reported)
        assert reconcile(desired, reported) is None
        if reported.state != "failed":
            assert reported.release == release
            assert outcome(desired, reported) == ("idle" if release is None else "serving")


@given(st.lists(wishes, min_size=1), st.data())
def test_wishes_out_of_order_end_at_the_newest(changes, data) -> None:
    sent = [NOTHING_DESIRED]
    for release, train in changes:
        sent.append(_wish(sent[-1], release, train=train))
    reported = NOTHING_REPORTED
    for desired in [*data.draw(st.permutations(sent)), sent[-1]]:
        reported = _follow(desired, reported, works=True)
    assert settled(sent[-1], reported)
    assert reported.release == sent[-1].release


def test_a_broken_release_is_not_fetched_again_until_it_is_wished_for_anew() -> None:
    desired = _wish(NOTHING_DESIRED, 1)
    failed = _follow(desired, NOTHING_REPORTED, works=False)
    assert outcome(desired, failed) == "failed"
    assert reconcile(desired, failed) is None
    anew = _wish(desired, 1, train=True)
    assert reconcile(anew, failed) == Install("m", 1)


def test_an_agent_that_starts_again_takes_its_wish_up_again() -> None:
    desired = _wish(NOTHING_DESIRED, 1)
    restarted = Reported(desired_version=desired.version, model=None, release=None, state="idle")
    assert reconcile(desired, restarted) == Install("m", 1)
    assert not settled(desired, restarted)


def test_work_under_way_is_left_alone() -> None:
    desired = _wish(NOTHING_DESIRED, 2)
    for state in ("fetching", "checking"):
        reported = Reported(desired_version=desired.version, model="m", release=1, state=state)
        assert reconcile(desired, reported) is None
        assert not settled(desired, reported)


def test_an_answer_to_an_earlier_wish_settles_nothing() -> None:
    first = _wish(NOTHING_DESIRED, 1)
    serving = _follow(first, NOTHING_REPORTED, works=True)
    again = _wish(_wish(first, 2), 1)
    assert serving.release == again.release
    assert outcome(again, serving) == "pending"
    assert outcome(again, None) == "pending"
    assert reconcile(again, serving) == Confirm()


runs = st.sampled_from([(None, None), ("m", 1), ("m", 2), ("n", 1)])
versions = st.integers(0, 3)
states = st.sampled_from(["idle", "fetching", "checking", "serving", "failed"])


def _reported(version, run, state) -> Reported:
    return Reported(desired_version=version, model=run[0], release=run[1], state=state)


@given(versions, runs, versions, runs, states)
def test_only_the_answer_to_this_version_settles_it(version, wanted, seen, run, state) -> None:
    desired = Desired(version=version, model=wanted[0], release=wanted[1])
    how = outcome(desired, _reported(seen, run, state))
    if seen != version or state in {"fetching", "checking"}:
        assert how == "pending"
    if how in {"serving", "idle"}:
        assert run == wanted
        assert how == state
    assert (how == "failed") == (seen == version and state == "failed")


@pytest.mark.parametrize(
    ("wanted", "run", "state", "how"),
    [
        (("m", 1), ("m", 1), "serving", "serving"),
        (("m", 2), ("m", 1), "failed", "failed"),
        (("m", 2), ("m", 1), "serving", "pending"),
        (("m", 1), ("m", 1), "idle", "pending"),
        ((None, None), (None, None), "idle", "idle"),
        ((None, None), ("m", 1), "idle", "pending"),
        ((None, None), ("m", 1), "serving", "pending"),
    ],
)
def test_outcomes(wanted, run, state, how) -> None:
    desired = Desired(version=7, model=wanted[0], release=wanted[1])
    assert outcome(desired, _reported(7, run, state)) == how
    assert outcome(desired, None) == "pending"


def test_going_back_to_what_still_runs_waits_for_the_device_to_say_so() -> None:
    serving = _reported(1, ("m", 1), "serving")
    assert outcome(Desired(version=1, model="m", release=1), serving) == "serving"
    assert outcome(Desired(version=3, model="m", release=1), serving) == "pending"
