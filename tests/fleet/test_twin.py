import pytest
from atoll.fleet.twin import outcome
from atoll.fleet.wire import Desired, Reported
from hypothesis import given
from hypothesis import strategies as st

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
