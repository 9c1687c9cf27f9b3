"""Rounds that do not wait for the slowest: enough contributions, and local training cut short."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from blobs import Blobs, write
from cohorts import fleet, plan_of, varied

from atoll.federation import local_update, messages, parameters, plan, training
from atoll.federation.engine import Vanished
from atoll.federation.errors import BadPlan
from atoll.federation.kept import KeptHere
from atoll.federation.plan import Training
from atoll.federation.run import RoundReport
from atoll.federation.strategies import effective_steps
from atoll.federation.task import Examples, Split
from atoll.privacy.errors import BadParameters


class Counting(Blobs):
    """Counts how often its examples are read for training."""

    def __init__(self) -> None:
        self.trained = 0

    def load(self, data: Path, split: Split) -> Examples:
        self.trained += split == "train"
        return super().load(data, split)


class Silent(Counting):
    """Falls silent when it is to train."""

    def load(self, data: Path, split: Split) -> Examples:
        super().load(data, split)
        raise Vanished


@pytest.mark.parametrize("mode", ["plain", "secagg", "he"])
def test_a_round_ends_with_enough_contributions(tmp_path: Path, mode: str) -> None:
    """The result is that of the cohort of the fastest; the others are named with the reason."""
    reports: list[RoundReport] = []
    asked = varied(plan_of(mode, count=2), cohort={"enough": 3})
    done = fleet(tmp_path / "five", 5).run(asked, on_round=reports.append)
    assert [report.survivors for report in reports] == [("device-1", "device-2", "device-3")] * 2
    assert reports[0].dropped == dict.fromkeys(
        ("device-4", "device-5"), "3 others were faster, and they were enough"
    )
    alone = fleet(tmp_path / "three", 3).run(plan_of(mode, count=2))
    np.testing.assert_array_equal(done.weights, alone.weights)


def test_masked_sums_that_half_of_the_cohort_could_not_open_are_refused(tmp_path: Path) -> None:
    asked = varied(plan_of("secagg"), cohort={"enough": 2})
    with pytest.raises(BadParameters, match=r"raise cohort\.enough to 3"):
        fleet(tmp_path, 4).run(asked)


def test_who_drops_out_does_not_count_towards_enough(tmp_path: Path) -> None:
    reports: list[RoundReport] = []
    silent, last = Silent(), Counting()
    here = fleet(tmp_path, 4, {"device-1": silent, "device-4": last})
    asked = varied(plan_of(count=1), cohort={"enough": 2})
    here.run(asked, on_round=reports.append)
    assert reports[0].survivors == ("device-2", "device-3")
    # Asked second to last and not at all: nobody pulled what would have made it compute.
    assert (silent.trained, last.trained) == (1, 0)


def test_a_device_asked_anew_forgets_what_nobody_waits_for(tmp_path: Path) -> None:
    here = fleet(tmp_path, 3, {"device-3": (slow := Counting())})
    here.run(varied(plan_of(count=5), cohort={"enough": 2}))
    assert slow.trained == 0
    assert len(here.grid._waiting) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            "enough = 1\nmin_devices = 2",
            "cohort.enough = 1 ends a round below cohort.min_devices = 2",
        ),
        ("enough = 2\nsampling_rate = 0.5", "leave one of them out"),
        ("enough = 0", "enough"),
    ],
)
def test_enough_that_cannot_work_is_refused(fields: str, said: str) -> None:
    text = f'name = "a"\ntask = "a"\nmodel = "a"\n[cohort]\n{fields}'
    with pytest.raises(BadPlan, match=said):
        plan.loads(text)


BLOBS = Blobs()


def ticking(step: float) -> Callable[[], float]:
    """Return a clock that moves on by ``step`` seconds whenever it is looked at."""
    ticks: Iterator[int] = count()
    return lambda: next(ticks) * step


def local(
    tmp_path: Path,
    seconds: float,
    now: Callable[[], float],
    task: Blobs = BLOBS,
    **how: object,
) -> np.ndarray:
    """Return the term, in floats, of a device with 60 examples in batches of 16."""
    data = write(tmp_path, 1)
    start = parameters.flatten(task.model(0))
    work = messages.TrainAsk(
        task=task.name,
        weights=parameters.to_bytes(start),
        seed=1,
        local_epochs=2,
        batch_size=16,
        learning_rate=0.1,
        momentum=0.0,
        clip_norm=1000.0,
        bits=24,
        noise_multiplier=0.0,
        seconds=seconds,
        **how,
    )
    ask = messages.SumAsk(
        mode="plain",
        phase="contribute",
        payload=b"",
        party="me",
        run="run",
        round=1,
        length=len(start),
        bound=1,
        parties=1,
        min_survivors=1,
    )
    term, _ = local_update.make(task, data, work, ask, KeptHere(), now=now)
    return term * 1000.0 / ((1 << 23) - 1)


def stepped(tmp_path: Path, steps: int) -> np.ndarray:
    """Return the change after so many of the device's own steps."""
    task = Blobs()
    start = parameters.flatten(task.model(0))
    left = iter(range(steps - 1))
    done = training.train(
        task.model(0),
        start,
        task.load(write(tmp_path, 1), "train"),
        Training(local_epochs=2, batch_size=16, learning_rate=0.1, momentum=0.0),
        training.local_seed(1, "run", 1, "me"),
        ended=lambda: next(left, None) is None,
    )
    assert done.steps == steps
    return done.weights - start


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8])
def test_a_device_out_of_time_sends_what_it_has_come_to(tmp_path: Path, steps: int) -> None:
    """The clock is looked at when training starts and after each step, and ticks a second."""
    sent = local(tmp_path, float(steps), ticking(1.0))
    np.testing.assert_allclose(sent, stepped(tmp_path, steps), atol=2e-4)


def test_reading_examples_is_no_part_of_the_deadline(tmp_path: Path) -> None:
    tick, read = ticking(1.0), []

    class Late(Blobs):
        def load(self, data: Path, split: Split) -> Examples:
            read.append(100.0)
            return super().load(data, split)

    sent = local(tmp_path, 3.0, lambda: tick() + sum(read), task=Late())
    assert read
    np.testing.assert_allclose(sent, stepped(tmp_path, 3), atol=2e-4)


def test_without_a_deadline_no_clock_is_looked_at(tmp_path: Path) -> None:
    def never() -> float:
        raise AssertionError

    np.testing.assert_allclose(local(tmp_path, 0.0, never), stepped(tmp_path, 8), atol=2e-4)


def test_partial_work_is_divided_by_the_steps_that_were_taken(tmp_path: Path) -> None:
    """FedNova's normalisation, so that a slow device counts as much as a fast one."""
    how = Training(learning_rate=0.1, momentum=0.0)
    most = effective_steps(8, how)
    sent = local(tmp_path, 3.0, ticking(1.0), most_steps=most)
    np.testing.assert_allclose(sent[:-1] * 3, stepped(tmp_path, 3), atol=6e-4)
    assert sent[-1] == pytest.approx(1000.0 * 3 / 8, rel=1e-6)


def test_a_deadline_reaches_the_device_and_is_refused_where_steps_are_promised(
    tmp_path: Path,
) -> None:
    asked = varied(plan_of(count=1), training={"deadline": 1e-9, "local_epochs": 50})
    full = varied(plan_of(count=1), training={"local_epochs": 50})
    short, long = (fleet(tmp_path, 2).run(one).weights for one in (asked, full))
    one_step = varied(plan_of(count=1), training={"batch_size": 60})
    start = parameters.flatten(Blobs().model(asked.seed))
    assert not np.array_equal(short, long)
    assert (
        np.linalg.norm(short - start)
        < np.linalg.norm(fleet(tmp_path, 2).run(one_step).weights - start) * 3
    )
    protected = (
        'name = "a"\ntask = "a"\nmodel = "a"\n[training]\ndeadline = 1.0\n[privacy.examples]\n'
        "noise_multiplier = 1.0\nclip_norm = 1.0\nsampling_rate = 0.1\nsteps = 3"
    )
    with pytest.raises(BadPlan, match=r"leave training\.deadline out"):
        plan.loads(protected)
