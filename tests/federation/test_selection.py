"""Who takes part in a round by turns and by rule, as a property and through real rounds."""

from dataclasses import replace

import msgspec
import pytest
from blobs import Blobs
from cohorts import fleet, plan_of, varied
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation import parameters, release, rounds, selection
from atoll.federation import plan as plans
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.exchange import Clock
from atoll.federation.plan import Cohort, Privacy
from atoll.privacy.keystream import Keystream

TEXT = 'name = "x"\ntask = "t"\nmodel = "m"\n[cohort]\n'


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32))
def test_turns_of_devices_that_are_always_there_differ_by_at_most_one(count, size, rounds, seed):
    names, turns = [f"device-{n}" for n in range(count)], {}
    for number in range(1, rounds + 1):
        lots = selection.lots_of(seed, "run", number)
        chosen = selection.fewest_turns(names, turns, size, lots)
        assert len(set(chosen)) == min(size, count)
        turns = selection.after(turns, chosen)
        each = [turns.get(name, 0) for name in names]
        assert max(each) - min(each) <= 1
        assert sum(each) == number * min(size, count)


@given(
    st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=20), st.integers(1, 10)
)
def test_nobody_is_asked_before_one_that_is_there_and_was_asked_less(there, size):
    turns = {}
    for number, names in enumerate(there):
        here = sorted(names)
        chosen = selection.fewest_turns(here, turns, size, selection.lots_of(0, "r", number))
        passed_over = [turns.get(name, 0) for name in here if name not in chosen]
        assert max(turns.get(name, 0) for name in chosen) <= min(passed_over, default=10**9)
        turns = selection.after(turns, chosen)


def test_between_equals_every_device_is_as_likely() -> None:
    counts, entropy = dict.fromkeys(range(5), 0), Keystream.replayable(1)
    for _ in range(5000):
        for name in selection.fewest_turns(range(5), {}, 2, entropy):
            counts[name] += 1
    # Each is in with 2/5, so 2,000 times with a standard deviation of 35.
    assert all(abs(count - 2000) < 6 * 35 for count in counts.values())


def test_lots_depend_on_seed_run_and_round_and_on_nothing_else() -> None:
    def first(*of):
        return selection.lots_of(*of).words(1)[0]

    assert first(1, "r", 2) == first(1, "r", 2)
    assert len({first(1, "r", 2), first(2, "r", 2), first(1, "s", 2), first(1, "r", 3)}) == 4


@pytest.mark.parametrize(
    ("cohort", "why"),
    [
        ("size = 8\nsampling_rate = 0.5", "leave one of them out"),
        ("size = 2\nmin_devices = 3", "every round would be thrown away"),
        ("size = 0", "size"),
        ('rule = ""', "rule"),
    ],
)
def test_cohorts_that_contradict_themselves_are_refused(cohort, why) -> None:
    with pytest.raises(BadPlan, match=why):
        plans.loads(TEXT + cohort)


def test_the_ledger_never_counts_on_a_rule_or_on_turns() -> None:
    privacy = Privacy(noise="central", noise_multiplier=1.0, delta=1e-6)
    sampled = Cohort(min_devices=40, sampling_rate=0.1)
    plan = msgspec.structs.replace(plan_of(), cohort=sampled, privacy=privacy)
    assert release.amplification(plan, 1000) == 0.1
    ruled = msgspec.structs.replace(plan, cohort=msgspec.structs.replace(sampled, rule="true"))
    assert release.amplification(ruled, 1000) is None
    assert release.devices(ruled, 1000, 1000, 77) == 77
    turns = msgspec.structs.replace(plan, cohort=Cohort(min_devices=40, size=100))
    assert release.amplification(turns, 1000) is None


def test_a_sum_has_room_for_the_devices_of_a_round_and_he_for_those_of_the_run() -> None:
    asked = varied(plan_of(), cohort={"size": 5})
    assert release.parties(asked, 4) == 4
    assert release.parties(asked, 400) == 5
    assert release.parties(varied(asked, privacy={"mode": "he"}), 400) == 400


@pytest.mark.parametrize("mode", ["plain", "secagg"])
def test_devices_train_in_turns(tmp_path, mode) -> None:
    here, reports = fleet(tmp_path, 5), []
    plan = varied(plan_of(mode, count=5), cohort={"size": 3})
    done = here.run(plan, on_round=reports.append)
    assert [len(report.survivors) for report in reports] == [3] * 5
    assert set(done.turns) == set(here.cohort.trainers)
    assert set(done.turns.values()) == {3}
    assert all(not report.dropped for report in reports)


def test_turns_survive_a_restart_and_the_same_seed_gives_the_same_turns(tmp_path) -> None:
    plan = varied(plan_of(count=4), cohort={"size": 2})
    whole = []
    fleet(tmp_path / "a", 4).run(plan, on_round=lambda r: whole.append(r.survivors))
    halves = []
    there, kept = fleet(tmp_path / "b", 4), Checkpoints(tmp_path / "kept")
    short = msgspec.structs.replace(plan, rounds=2)
    for one in (short, plan):
        there.run(one, checkpoints=kept, on_round=lambda r: halves.append(r.survivors))
    assert halves == whole
    assert set(kept.load("run").turns.values()) == {2}


def test_a_round_in_turns_that_broke_off_is_not_asked_of_others_under_its_charge(tmp_path) -> None:
    here, kept, charged, reports = fleet(tmp_path, 4), Checkpoints(tmp_path / "kept"), [], []
    plan = varied(plan_of(count=2), cohort={"size": 2})
    here.run(plan, checkpoints=kept)
    kept.save(replace(kept.load("run"), begun=2, ended=1, completed=1))
    here.run(plan, checkpoints=kept, charge=charged.append, on_round=reports.append)
    assert charged == [3]
    assert reports[0].round == 2
    assert not reports[0].survivors


class Rule:
    """Leaves the devices of ``out`` out, looking anew each time."""

    def __init__(self, *out):
        self.out, self.looks = list(out), 0

    def __call__(self):
        out = self.out[min(self.looks, len(self.out) - 1)]
        self.looks += 1
        return out


def run(here, plan, rule, reports):
    asked = here.of(plan, on_round=reports.append, left_out=rule)
    return rounds.run_rounds(asked, parameters.flatten(Blobs().model(plan.seed)))


@pytest.mark.parametrize("mode", ["plain", "he", "secagg"])
def test_a_rule_is_looked_at_anew_before_each_round(tmp_path, mode) -> None:
    here, reports = fleet(tmp_path, 4), []
    plan = varied(plan_of(mode, count=3), cohort={"rule": "device.power"})
    done = run(here, plan, Rule({"device-1"}, {"device-2", "device-3"}, set()), reports)
    assert [report.survivors for report in reports] == [
        ("device-2", "device-3", "device-4"),
        ("device-1", "device-4"),
        ("device-1", "device-2", "device-3", "device-4"),
    ]
    assert done.turns == {"device-1": 2, "device-2": 2, "device-3": 2, "device-4": 3}


def test_a_rule_that_nobody_can_judge_does_not_run(tmp_path) -> None:
    with pytest.raises(BadPlan, match=r"cohort\.rule"):
        fleet(tmp_path, 2).run(varied(plan_of(), cohort={"rule": "device.power"}))
    assert selection.judged(None, None)() == ()
    assert selection.judged("device.power", Rule({"a"}))() == {"a"}


def test_a_rule_that_few_meet_is_waited_for(tmp_path) -> None:
    here, reports = fleet(tmp_path, 3), []
    few = {"device-1", "device-2"}
    plan = varied(plan_of(count=1), cohort={"rule": "device.power"})
    run(here, plan, Rule(few, few, few, set()), reports)
    assert len(reports[0].survivors) == 3
    assert here.grid.clock.now() >= 1.5


def test_a_rule_that_few_ever_meet_ends_the_run_and_says_so() -> None:
    time = [0.0]

    def pause(seconds):
        time[0] += seconds

    with pytest.raises(RoundFailed, match=r"cohort\.rule leaves 1 of 2 .* needs 2"):
        selection.await_allowed(
            ["a", "b"], lambda: {"a"}, least=2, timeout=60, clock=Clock(lambda: time[0], pause)
        )
    assert time[0] >= 60
