import pytest
from atoll.fleet.twin import (
    NOTHING_DESIRED,
    NOTHING_REPORTED,
    Confirm,
    Install,
    Stop,
    next_version,
    outcome,
    reconcile,
    settled,
)
from atoll.fleet.wire import Desired, Reported
from hypothesis import given
from hypothesis import strategies as st

wishes = st.tuples(st.sampled_from([None, 1, 2, 3]), st.booleans())


def _wish(before: Desired, release: int | None, *, train: bool = False) -> Desired:
    model = None if release is None else "m"
    return next_version(before, model=model, release=release, train=train)


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


@given(st.lists(wishes))
def test_versions_only_grow_and_grow_only_with_a_change(changes) -> None:
    desired = NOTHING_DESIRED
    for release, train in changes:
        after = _wish(desired, release, train=train)
        changed = (after.release, after.train) != (desired.release, desired.train)
        assert after.version == desired.version + changed
        assert (after.release, after.train) == (release, train)
        desired = after


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


def test_half_a_wish_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a release"):
        next_version(NOTHING_DESIRED, model="m", release=None, train=False)
