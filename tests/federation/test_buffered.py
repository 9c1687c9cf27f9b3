"""Asynchronous steps by hand, on a virtual clock, and against rounds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from blobs import Blobs
from cohorts import Fleet, fleet, plan_of, varied
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.federation import buffered, layout, messages, parameters, plan, rounds, training
from atoll.federation.buffer import weight
from atoll.federation.buffered import run_buffered
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort
from atoll.federation.engine import Vanished
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.plan import Asynchrony
from atoll.federation.progress import PATIENCE, Outcome
from atoll.federation.run import RoundReport, Run
from atoll.federation.selection import LeftOut, nobody
from atoll.federation.task import Examples, Split
from atoll.privacy import update
from atoll.privacy.errors import BadParameters, BudgetExceeded
from atoll.privacy.keystream import Keystream
from atoll.privacy.update import UpdateSpec
from atoll.simulations.pace import PacedGrid


class Listening(PacedGrid):
    """Remembers what was asked, in order: number, device, seconds, weights it starts from."""

    def __init__(self, apps: Mapping[int, object], seconds: Callable[[int], float]) -> None:
        super().__init__(apps, seconds)
        self.asked: list[tuple[int, str, float, np.ndarray]] = []
        self.counted: list[tuple[str, int]] = []

    def push_messages(self, sent: Iterable[Message]) -> Iterable[str]:
        known = list(sent)
        for message in known:
            if message.metadata.message_type != messages.TRAIN:
                continue
            ask = messages.unpack(message.content, messages.SumAsk)
            work = messages.unpack(message.content, messages.TrainAsk)
            start = parameters.from_bytes(work.weights)
            self.asked.append((ask.round, ask.party, self.clock.now(), start))
            self.counted.append((ask.party, ask.counted))
        return super().push_messages(known)


@dataclass
class Paced:
    """Devices of given seconds, named ``device-1`` and so on."""

    here: Fleet
    seconds: Mapping[int, float]
    grid: Listening = field(init=False)

    def __post_init__(self) -> None:
        self.grid = Listening(self.here.grid._apps, self.seconds.__getitem__)

    @property
    def cohort(self) -> Cohort:
        return self.here.cohort

    def run(
        self,
        the_plan: plan.Plan,
        *,
        left_out: LeftOut = nobody,
        charge: Callable[[int], float | None] = lambda _: None,
        on_round: Callable[[RoundReport], None] = lambda _: None,
        checkpoints: Checkpoints | None = None,
        entropy: Keystream | None = None,
        run: Callable[[Run, np.ndarray], Outcome] = run_buffered,
    ) -> Outcome:
        shape = layout.of(Blobs(), the_plan.seed)
        asked = Fleet(self.grid, self.cohort).of(
            the_plan,
            running=shape.running,
            charge=charge,
            on_round=on_round,
            checkpoints=checkpoints,
            entropy=entropy,
            left_out=left_out,
        )
        return run(asked, shape.initial)


def paced(folder: Path, seconds: list[float], tasks: Mapping[str, Blobs] | None = None) -> Paced:
    return Paced(fleet(folder, len(seconds), tasks), dict(enumerate(seconds, start=1)))


def asynchronous(count: int, buffer: int, concurrency: int, **more: object) -> plan.Plan:
    """Steps by the mean itself, on a fine grid."""
    most = more.pop("max_staleness", None)
    the_plan = varied(
        plan_of(count=count),
        training={"server_momentum": 0.0, "averaged_rounds": 1},
        privacy={"bits": 24, "clip_norm": 50.0},
    )
    the_plan = varied(the_plan, **more)
    return msgspec.structs.replace(the_plan, asynchrony=Asynchrony(buffer, concurrency, most))


def change(here: Paced, folder: Path, the_plan: plan.Plan, number: int) -> np.ndarray:
    """What the device that was asked under ``number`` came to, by local training alone."""
    ((name, start),) = [
        (name, start) for asked, name, _, start in here.grid.asked if asked == number
    ]
    seed = training.local_seed(the_plan.seed, "run", number, name)
    examples = Blobs().load(folder / name, "train")
    done = training.train(Blobs().model(0), start, examples, the_plan.training, seed)
    return (done.weights - start).astype(np.float64)


def numbers_of(here: Paced, name: str) -> list[int]:
    return [number for number, asked, *_ in here.grid.asked if asked == name]


# --- by hand ---


def test_a_stale_update_counts_less_by_the_root_of_its_age() -> None:
    assert [weight(age) for age in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]


def test_three_devices_and_five_steps_by_hand(tmp_path: Path) -> None:
    """Two of a second each make steps 1 to 3; the third's update is three steps old by then."""
    here, reports = paced(tmp_path, [1.0, 1.0, 3.95]), []
    the_plan = asynchronous(count=5, buffer=2, concurrency=3)
    done = here.run(the_plan, on_round=reports.append)
    fast = ("device-1", "device-2")
    assert [report.survivors for report in reports][:3] == [fast] * 3
    assert reports[3].survivors == ("device-1", "device-3")
    assert [report.round for report in reports] == [1, 2, 3, 4, 5]
    # Device 2's came when that was enough: it is a step old in step 5, and not asked for twice.
    assert reports[4].survivors == fast
    one, two, three = (numbers_of(here, f"device-{i}") for i in (1, 2, 3))
    x = parameters.flatten(Blobs().model(the_plan.seed)).astype(np.float64)
    for step in range(3):
        x += (
            change(here, tmp_path, the_plan, one[step])
            + change(here, tmp_path, the_plan, two[step])
        ) / 2
    x += (
        0.5 * change(here, tmp_path, the_plan, three[0]) + change(here, tmp_path, the_plan, one[3])
    ) / 2
    begun_with_step_5 = next(
        start for n, _, _, start in here.grid.asked if n >= 5 * buffered.STRIDE
    )
    assert begun_with_step_5 == pytest.approx(x, abs=1e-4)
    x += (
        weight(1) * change(here, tmp_path, the_plan, two[3])
        + change(here, tmp_path, the_plan, one[4])
    ) / 2
    assert done.weights == pytest.approx(x, abs=1e-4)
    assert done.rounds == 5


def test_with_all_devices_in_the_buffer_it_is_fedavg(tmp_path: Path) -> None:
    full = {
        "training": {
            "batch_size": 60,
            "server_momentum": 0.5,
            "weighting": "capped",
            "weight_cap": 70,
        }
    }
    the_plan = asynchronous(4, 3, 3, **full)
    done = paced(tmp_path / "a", [1.0, 5.0, 2.0]).run(the_plan)
    wanted = fleet(tmp_path / "b", 3).run(msgspec.structs.replace(the_plan, asynchrony=None))
    # The seeds of batches are others, and a batch is everything here.
    assert done.weights == pytest.approx(wanted.weights, abs=2e-4)
    assert np.abs(done.weights - parameters.flatten(Blobs().model(the_plan.seed))).max() > 0.05


def test_a_slow_device_does_not_hold_up_the_others(tmp_path: Path) -> None:
    speeds = [1.0, 1.0, 1.0, 100.0]
    in_steps = paced(tmp_path / "a", speeds)
    in_steps.run(asynchronous(12, 3, 4))
    in_rounds = paced(tmp_path / "b", speeds)
    in_rounds.run(
        msgspec.structs.replace(asynchronous(12, 3, 4), asynchrony=None), run=rounds.run_rounds
    )
    assert in_steps.grid.clock.now() < 12 * 1.3
    assert in_rounds.grid.clock.now() >= 12 * 60  # when it counts as dropped out


def test_rounds_refuse_a_plan_of_steps_before_anything_is_charged(tmp_path: Path) -> None:
    here, charged = paced(tmp_path, [1.0] * 3), []
    with pytest.raises(BadPlan, match=r"a plan with \[asynchrony\] runs in steps"):
        here.run(asynchronous(2, 2, 2), charge=charged.append, run=rounds.run_rounds)
    assert charged == []
    assert here.grid.asked == []


def test_no_more_devices_train_at_a_time_than_asked(tmp_path: Path) -> None:
    here = paced(tmp_path, [1.0, 2.0, 3.0, 4.0, 5.0])
    reports: list[RoundReport] = []
    here.run(asynchronous(6, 2, 2), on_round=reports.append)
    spans = [(at, at + here.seconds[int(name[-1])]) for _, name, at, _ in here.grid.asked]
    for at, _ in spans:
        assert sum(began <= at < ended for began, ended in spans) <= 2
    # Whoever was not asked for longest is next: nobody is left out.
    assert {name for _, name, *_ in here.grid.asked[:5]} == set(here.cohort.trainers)


@given(
    speeds=st.lists(st.sampled_from([0.1, 0.7, 1.0, 2.5, 9.0]), min_size=3, max_size=5),
    buffer=st.integers(2, 3),
    concurrency=st.integers(1, 6),
    most=st.sampled_from([None, 0, 1]),
)
@settings(max_examples=12)
def test_every_update_is_folded_in_once_at_most_and_no_device_twice_in_a_step(
    tmp_path_factory: pytest.TempPathFactory,
    speeds: list[float],
    buffer: int,
    concurrency: int,
    most: int | None,
) -> None:
    here = paced(tmp_path_factory.mktemp("fleet"), speeds)
    reports: list[RoundReport] = []
    folded: list[int] = []
    versions: list[bytes] = []
    the_plan = asynchronous(5, buffer, concurrency, max_staleness=most)

    def heard(report: RoundReport) -> None:
        reports.append(report)
        kept = checkpoints.load("run")
        folded.extend(kept.counted[name] for name in report.survivors)
        versions.append(parameters.to_bytes(kept.weights))

    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    here.run(the_plan, on_round=heard, checkpoints=checkpoints)
    asked = {number: name for number, name, *_ in here.grid.asked}
    assert len(asked) == len(here.grid.asked)
    assert list(asked) == sorted(asked)
    assert len(set(folded)) == len(folded)
    assert set(folded) <= set(asked)
    for report in reports:
        assert len(report.survivors) == buffer or most is not None
        assert len(set(report.survivors)) == len(report.survivors)
        assert not set(report.survivors) & set(report.dropped)
    first = parameters.to_bytes(parameters.flatten(Blobs().model(the_plan.seed)))
    for number, _, _, start in here.grid.asked:
        step = number // buffered.STRIDE
        assert parameters.to_bytes(start) == ([first, *versions])[step - 1]


# --- what goes wrong ---


class Fails(Blobs):
    """Fails, or falls silent, whenever it is to train after the first ``sound`` times."""

    def __init__(self, error: Exception, sound: int = 0) -> None:
        self._error, self._sound, self._calls = error, sound, 0

    def load(self, data: Path, split: Split) -> Examples:
        self._calls += 1
        if self._calls > self._sound:
            raise self._error
        return super().load(data, split)


def test_a_device_that_vanished_frees_its_place_after_the_timeout(tmp_path: Path) -> None:
    here = paced(tmp_path, [1.0] * 4, {"device-4": Fails(Vanished())})
    reports: list[RoundReport] = []
    # One place is taken by device 4 from the first step on; it was asked at 0 s.
    the_plan = asynchronous(40, 2, 2, cohort={"round_timeout": 20.0})
    here.run(the_plan, on_round=reports.append)
    said = [report.dropped for report in reports if report.dropped]
    assert said
    assert all(dropped == {"device-4": "no answer within 20 s"} for dropped in said)
    assert all(len(report.survivors) == 2 for report in reports)
    times = [at for _, name, at, _ in here.grid.asked if name == "device-4"]
    assert min(np.diff(times)) >= 20.0


def test_a_device_that_fails_is_named_and_the_next_one_asked(tmp_path: Path) -> None:
    here = paced(tmp_path, [1.0] * 4, {"device-1": Fails(OSError("the disk is gone"))})
    reports: list[RoundReport] = []
    here.run(asynchronous(3, 3, 2), on_round=reports.append)
    assert all(report.survivors == ("device-2", "device-3", "device-4") for report in reports)
    said = [report.dropped for report in reports if report.dropped]
    assert said
    assert all("disk is gone" in dropped["device-1"] for dropped in said)


def test_an_update_that_is_too_old_is_dropped(tmp_path: Path) -> None:
    here, reports = paced(tmp_path, [1.0, 1.0, 3.95]), []
    here.run(asynchronous(5, 2, 3, max_staleness=2), on_round=reports.append)
    (said,) = [report.dropped for report in reports if report.dropped]
    assert said == {"device-3": "its update is 3 steps old, and 2 are allowed"}


def test_a_buffer_that_cannot_be_filled_steps_with_what_there_is(tmp_path: Path) -> None:
    here = paced(tmp_path, [1.0] * 4, {"device-1": Fails(OSError("gone"))})
    reports: list[RoundReport] = []
    the_plan = asynchronous(2, 4, 4)
    done = here.run(the_plan, on_round=reports.append)
    assert [len(report.survivors) for report in reports] == [3, 3]
    start = parameters.flatten(Blobs().model(the_plan.seed))
    first = [number for number, *_ in here.grid.asked if number < 2 * buffered.STRIDE]
    mean = np.mean([change(here, tmp_path, the_plan, n) for n in first if _sound(here, n)], axis=0)
    second = next(start for n, _, _, start in here.grid.asked if n >= 2 * buffered.STRIDE)
    assert second == pytest.approx(start + mean, abs=1e-4)
    assert done.rounds == 2


def _sound(here: Paced, number: int) -> bool:
    return number not in numbers_of(here, "device-1")


def test_steps_of_too_few_change_nothing_and_end_the_run(tmp_path: Path) -> None:
    tasks = {f"device-{i}": Fails(OSError("gone")) for i in (1, 2)}
    here, charged = paced(tmp_path, [1.0] * 3, tasks), []
    reports: list[RoundReport] = []
    with pytest.raises(RoundFailed, match="thrown away"):
        here.run(asynchronous(9, 2, 3), charge=charged.append, on_round=reports.append)
    assert charged == [1, 2, 3]
    assert [report.survivors for report in reports] == [()] * PATIENCE
    assert set(reports[0].dropped) == {"device-1", "device-2", "device-3"}
    first = here.grid.asked[0][3]
    assert all(np.array_equal(start, first) for *_, start in here.grid.asked)


# --- privacy, budgets and restarts ---


def test_a_step_is_charged_before_anybody_is_asked_for_it(tmp_path: Path) -> None:
    here, at = paced(tmp_path, [1.0, 1.0, 4.0]), []
    here.run(asynchronous(4, 2, 3), charge=lambda number: at.append((number, len(here.grid.asked))))
    assert [number for number, _ in at] == [1, 2, 3, 4]
    for (number, asked), (_, later) in pairwise(at):
        assert all(n // buffered.STRIDE == number for n, *_ in here.grid.asked[asked:later])


def test_a_spent_budget_ends_the_run_with_what_was_trained(tmp_path: Path) -> None:
    def charge(number: int) -> None:
        if number > 2:
            raise BudgetExceeded("spent")

    done = paced(tmp_path, [1.0, 1.0]).run(asynchronous(5, 2, 2), charge=charge)
    assert (done.ended, done.rounds) == ("budget", 2)


def test_the_noise_is_the_hubs_on_the_whole_sum(tmp_path: Path) -> None:
    noise = {"noise": "central", "noise_multiplier": 0.5}
    the_plan = asynchronous(1, 3, 3, privacy={**noise, "clip_norm": 100.0, "bits": 16})
    done = paced(tmp_path / "b", [1.0] * 3).run(the_plan, entropy=Keystream.replayable(4))
    bare = paced(tmp_path / "c", [1.0] * 3).run(
        asynchronous(1, 3, 3, privacy={"clip_norm": 100.0, "bits": 16})
    )
    added = (done.weights - bare.weights) * 3  # of the sum
    # σ is 0.5·100 for each of 42 weights: the root mean square is within a third of it.
    assert 33 < np.sqrt(np.mean(added**2)) < 67


@given(
    st.lists(st.integers(-100, 100), min_size=1, max_size=6),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_what_is_weighed_stays_within_the_sensitivity_and_is_right_on_average(
    values: list[int], counts: float, seed: int
) -> None:
    spec = UpdateSpec(1.0, 9, 0.0, 2, riders=1)
    term = np.array([*values, 7], dtype=np.int64)
    if int(term[:-1] @ term[:-1]) > spec.sensitivity**2:
        return
    got = update.weighed(term, counts, 1, spec, Keystream.replayable(seed))
    assert got[-1] == 7
    assert np.abs(got[:-1] - counts * term[:-1]).max() < 1
    assert int(got[:-1] @ got[:-1]) <= spec.sensitivity**2
    if counts == 1:
        assert np.array_equal(got, term)


def test_a_weight_does_not_pull_towards_zero() -> None:
    spec, term = UpdateSpec(1.0, 16, 0.0, 2), np.full(20_000, 3, dtype=np.int64)
    got = update.weighed(term, 0.5, 0, spec, Keystream.replayable(1))
    assert abs(got.mean() - 1.5) < 4 * 0.5 / np.sqrt(20_000)


def test_a_run_taken_up_again_loses_what_was_in_training_and_a_step_takes_its_place(
    tmp_path: Path,
) -> None:
    here, checkpoints = paced(tmp_path / "a", [1.0, 1.0, 2.0]), Checkpoints(tmp_path / "run")
    the_plan = asynchronous(4, 2, 3)
    charged: list[int] = []

    def die(number: int) -> None:
        charged.append(number)
        if number == 3:
            here.grid._seconds = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)

    with pytest.raises(KeyboardInterrupt):
        here.run(the_plan, charge=die, checkpoints=checkpoints)
    here.grid._seconds = here.seconds.__getitem__
    reports: list[RoundReport] = []
    done = here.run(
        the_plan, charge=charged.append, on_round=reports.append, checkpoints=checkpoints
    )
    assert charged == [1, 2, 3, 4, 5]
    assert [report.round for report in reports] == [3, 4, 5]
    assert all("cannot be repeated" in why for why in reports[0].dropped.values())
    assert (done.rounds, done.ended) == (4, "complete")
    kept = checkpoints.load("run")
    assert (kept.begun, kept.ended, kept.lost, kept.trained) == (5, 5, 1, 4)
    numbers = [number for number, *_ in here.grid.asked]
    assert numbers == sorted(set(numbers))


def test_a_device_is_told_under_which_number_its_update_was_folded_in(tmp_path: Path) -> None:
    here = paced(tmp_path, [1.0, 1.0, 3.95])
    here.run(asynchronous(6, 2, 3))
    for name in here.cohort.trainers:
        told = [counted for party, counted in here.grid.counted if party == name]
        assert told == [0, *numbers_of(here, name)][: len(told)]


def test_equal_runs_without_noise_come_out_equal(tmp_path: Path) -> None:
    the_plan = asynchronous(6, 2, 3)
    first = paced(tmp_path / "a", [1.0, 1.4, 3.1]).run(the_plan)
    again = paced(tmp_path / "b", [1.0, 1.4, 3.1]).run(the_plan)
    assert np.array_equal(first.weights, again.weights)


def test_asking_for_the_accuracy_between_steps_takes_nothing_from_who_trains(
    tmp_path: Path,
) -> None:
    the_plan = asynchronous(6, 2, 3)
    quiet, asking = paced(tmp_path / "a", [1.0, 1.0, 3.95]), paced(tmp_path / "b", [1.0, 1.0, 3.95])
    reports: list[RoundReport] = []
    quiet.run(the_plan)
    asking.run(msgspec.structs.replace(the_plan, evaluate_every=3), on_round=reports.append)
    told = [(report.round, report.evaluated) for report in reports if report.accuracy is not None]
    assert told == [(3, 180), (6, 180)]
    trained = [report for report in reports if report.accuracy is None]
    assert [report.round for report in trained] == [1, 2, 3, 4, 5, 6]
    assert not any(report.dropped for report in trained)
    # The third device's update came all the same.
    assert any("device-3" in report.survivors for report in trained)


def test_who_may_not_train_now_is_not_asked(tmp_path: Path) -> None:
    here, out = paced(tmp_path, [1.0] * 4), [{"device-1"}, {"device-2"}, set()]
    reports: list[RoundReport] = []
    done = here.run(
        asynchronous(3, 3, 4), on_round=reports.append, left_out=lambda: out[len(reports)]
    )
    asked = [{name for n, name, *_ in here.grid.asked if n // buffered.STRIDE == k} for k in (1, 2)]
    assert "device-1" not in asked[0]
    assert "device-2" not in asked[1]
    turns = {name: len(numbers_of(here, name)) for name in here.cohort.trainers}
    assert done.turns == turns


# --- plans ---

ASYNC = "[asynchrony]\nbuffer = 3\nconcurrency = 4\n"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ('[privacy]\nmode = "secagg"', "known before"),
        ('[privacy]\nmode = "he"', "known before"),
        ('[privacy]\nmode = "plain"\nnoise_multiplier = 1.0', 'use privacy.noise = "central"'),
        ('[privacy]\nmode = "plain"\nclip = "adaptive"', "is for rounds"),
        ('[privacy]\nmode = "plain"\n[training]\ncontrol_steps = 3', "control_steps is for rounds"),
        ('[privacy]\nmode = "plain"\n[cohort]\nsize = 3', "cohort.size is for rounds"),
        ('[privacy]\nmode = "plain"\n[cohort]\nenough = 3', "cohort.enough is for rounds"),
        ('[privacy]\nmode = "plain"\n[cohort]\nsampling_rate = 0.5', "sampling_rate is for rounds"),
        ('[privacy]\nmode = "plain"\n[cohort]\nmin_devices = 4', "below cohort.min_devices = 4"),
        (
            '[privacy]\nmode = "plain"\n[cohort]\nmin_devices = 3\n[aggregation]\n'  # noqa: ISC004
            'rule = "median"\nbyzantine = 1',
            "aggregation.rule is for rounds",
        ),
    ],
)
def test_a_plan_refuses_what_is_for_rounds(fields: str, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        plan.loads(f'name = "p"\ntask = "t"\nmodel = "m"\n{ASYNC}\n{fields}\n')


def test_a_buffer_that_the_trainers_cannot_fill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadParameters, match=r"lower asynchrony\.buffer"):
        paced(tmp_path, [1.0] * 3).run(asynchronous(1, 4, 4))


def test_a_plan_in_rounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPlan, match="runs in rounds"):
        paced(tmp_path, [1.0] * 3).run(plan_of())
