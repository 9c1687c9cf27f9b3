import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from atoll.fleet import rollout as rollouts
from atoll.fleet.rollout import RUNNING, Rollout, Twin, start, step, supersede
from atoll.fleet.wire import Desired, Reported

OLD, NEW = 4, 5


class Fleet:
    """Devices that do what they are told, when they are online."""

    def __init__(self, devices, serving: int | None = OLD) -> None:
        self.twins: dict[str, Twin] = {}
        for device in devices:
            self.twins[device] = Twin(
                Desired(version=0),
                Reported(desired_version=0, model=None, release=None, state="idle"),
            )
            if serving is not None:
                self.tell({device: serving})
                self.answer(device)

    def tell(self, wishes: dict[str, int | None]) -> None:
        for device, release in wishes.items():
            desired, reported = self.twins[device]
            model = None if release is None else "m"
            wish = Desired(version=desired.version + 1, model=model, release=release)
            self.twins[device] = Twin(wish, reported)

    def answer(self, device: str, *, works: bool = True) -> None:
        desired, reported = self.twins[device]
        if works:
            state = "idle" if desired.release is None else "serving"
            answer = Reported(
                desired_version=desired.version,
                model=desired.model,
                release=desired.release,
                state=state,
            )
        else:
            answer = Reported(
                desired_version=desired.version,
                model=reported.model,
                release=reported.release,
                state="failed",
                error="disk is full",
            )
        self.twins[device] = Twin(desired, answer)

    def told(self, release: int | None = NEW) -> set[str]:
        return {device for device, twin in self.twins.items() if twin.desired.release == release}

    def step(self, rollout: Rollout) -> Rollout:
        rollout, tell = step(rollout, self.twins)
        self.tell(tell)
        return rollout


DEVICES = [f"d{number}" for number in range(10)]


def test_canaries_first_then_the_rest_then_done() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES, ["d3"]))
    assert (rollout.state, fleet.told()) == ("canary", {"d3"})
    fleet.answer("d3")
    rollout = fleet.step(rollout)
    assert (rollout.state, fleet.told()) == ("rolling", set(DEVICES))
    for device in DEVICES:
        assert rollout.state == "rolling"
        fleet.answer(device)
        rollout = fleet.step(rollout)
    assert rollout.state == "done"
    assert not rollout.reason


def test_an_offline_canary_is_waited_for() -> None:
    fleet = Fleet(DEVICES)
    rollout = start("m", NEW, OLD, DEVICES, ["d0", "d1"])
    for _ in range(5):
        rollout = fleet.step(rollout)
        fleet.answer("d0")
    assert (rollout.state, fleet.told()) == ("canary", {"d0", "d1"})


def test_an_offline_device_is_told_and_settles_later() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES))
    assert fleet.told() == set(DEVICES)
    for device in DEVICES[1:]:
        fleet.answer(device)
    rollout = fleet.step(rollout)
    assert rollout.state == "rolling"
    fleet.answer("d0")
    assert fleet.step(rollout).state == "done"


def test_a_failing_canary_halts_and_all_canaries_go_back() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES, ["d0", "d1"]))
    fleet.answer("d0")
    fleet.answer("d1", works=False)
    rollout = fleet.step(rollout)
    assert rollout.state == "halted"
    assert rollout.reason == "d1: disk is full"
    assert fleet.told() == set()
    assert fleet.told(OLD) == set(DEVICES)
    assert step(rollout, fleet.twins) == (rollout, {})


def test_without_a_fallback_a_failed_first_release_leaves_nothing_to_serve() -> None:
    fleet = Fleet(DEVICES, serving=None)
    rollout = fleet.step(start("m", NEW, None, DEVICES, ["d0"]))
    fleet.answer("d0", works=False)
    rollout, tell = step(rollout, fleet.twins)
    assert (rollout.state, tell) == ("halted", {"d0": None})


def test_a_few_failures_after_the_canaries_are_told_and_more_halt() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES))
    fleet.answer("d0", works=False)
    for device in DEVICES[2:]:
        fleet.answer(device)
    rollout = fleet.step(rollout)
    assert rollout.state == "rolling"
    more = Fleet(DEVICES)
    more.twins = dict(fleet.twins)
    fleet.answer("d1")
    rollout_done = fleet.step(rollout)
    assert (rollout_done.state, rollout_done.reason) == ("done", "d0: disk is full")
    more.answer("d1", works=False)
    assert more.step(rollout).state == "halted"
    assert more.told(OLD) == set(DEVICES)


def test_devices_that_left_the_fleet_are_passed_over() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES, ["d0", "d1"]))
    del fleet.twins["d1"], fleet.twins["d9"]
    fleet.answer("d0")
    rollout = fleet.step(rollout)
    assert rollout.state == "rolling"
    for device in list(fleet.twins):
        fleet.answer(device)
    assert fleet.step(rollout).state == "done"


def test_a_rollout_whose_canaries_all_left_halts() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES, ["d0"]))
    del fleet.twins["d0"]
    rollout, tell = step(rollout, fleet.twins)
    assert (rollout.state, tell) == ("halted", {})
    assert "no canary" in rollout.reason


def test_rolling_back_returns_every_device_that_was_told() -> None:
    fleet = Fleet(DEVICES)
    rollout = fleet.step(start("m", NEW, OLD, DEVICES, ["d0"]))
    rollout, tell = rollouts.roll_back(rollout, fleet.twins, "operator")
    assert (rollout.state, tell) == ("rolled-back", {"d0": OLD})
    fleet.tell(tell)
    assert rollouts.roll_back(rollout, fleet.twins, "operator").tell == {}


def test_only_a_running_rollout_is_superseded() -> None:
    running = start("m", NEW, OLD, DEVICES)
    ended = supersede(running, "release 6")
    assert ended.state == "superseded"
    assert supersede(ended, "release 7") == ended


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targets": []}, "no device"),
        ({"targets": ["a"], "canaries": ["b"]}, "among the devices: b"),
        ({"targets": ["a"], "fallback": NEW}, "own fallback"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused(fields, says) -> None:
    with pytest.raises(ValueError, match=says):
        start("m", NEW, **{"fallback": OLD, **fields})


class AnyOrder(RuleBasedStateMachine):
    """Devices answer, fail, leave and lag in any order; the rules hold throughout."""

    @initialize(devices=st.integers(1, 6), canaries=st.integers(0, 3))
    def begin(self, devices: int, canaries: int) -> None:
        names = DEVICES[:devices]
        self.fleet = Fleet(names)
        self.canaries = set(names[:canaries])
        self.rollout = start("m", NEW, OLD, names, names[:canaries])
        self.versions = {name: twin.desired.version for name, twin in self.fleet.twins.items()}

    @precondition(lambda self: self.fleet.twins)
    @rule(data=st.data(), works=st.booleans())
    def a_device_answers(self, data: st.DataObject, *, works: bool) -> None:
        self.fleet.answer(data.draw(st.sampled_from(sorted(self.fleet.twins))), works=works)

    @precondition(lambda self: self.fleet.twins)
    @rule(data=st.data())
    def a_device_leaves(self, data: st.DataObject) -> None:
        del self.fleet.twins[data.draw(st.sampled_from(sorted(self.fleet.twins)))]

    @rule()
    def the_hub_looks(self) -> None:
        before = self.rollout
        present = {name: twin for name, twin in self.fleet.twins.items() if name in self.canaries}
        served = bool(present) and all(
            twin.reported
            == Reported(
                desired_version=twin.desired.version, model="m", release=NEW, state="serving"
            )
            for twin in present.values()
        )
        decision = step(before, self.fleet.twins)
        if before.state == "canary":
            beyond = {name for name, release in decision.tell.items() if release == NEW}
            assert served or beyond <= self.canaries
        self.fleet.tell(decision.tell)
        self.rollout = decision.rollout
        assert step(self.rollout, self.fleet.twins).tell == {}

    @invariant()
    def versions_only_grow(self) -> None:
        for name, twin in self.fleet.twins.items():
            assert twin.desired.version >= self.versions[name]
            self.versions[name] = twin.desired.version

    @invariant()
    def nobody_is_told_a_third_release(self) -> None:
        assert all(twin.desired.release in {OLD, NEW} for twin in self.fleet.twins.values())

    @invariant()
    def a_halted_rollout_leaves_nobody_on_the_release(self) -> None:
        if self.rollout.state == "halted":
            assert not self.fleet.told()

    @invariant()
    def only_canaries_are_told_while_they_are_tried(self) -> None:
        if self.rollout.state == "canary":
            assert self.fleet.told() <= self.canaries

    @invariant()
    def done_means_that_everybody_answered(self) -> None:
        if self.rollout.state == "done":
            assert self.rollout.state not in RUNNING
            assert self.fleet.told() == set(self.fleet.twins)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30)
