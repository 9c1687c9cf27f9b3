"""Workers come to one sum, however many there are, and tell what went wrong."""

import os
import signal
import sys

import numpy as np
import pytest
from torch import nn

from atoll.federation.errors import DataMissing, RoundFailed
from atoll.federation.plan import Cohort, Plan, Privacy
from atoll.simulations import simulate
from atoll.simulations.digits import Digits
from atoll.simulations.populations import Simulated, named
from atoll.simulations.workers import Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")

PARTS = [[1, 2], [3], [4, 5, 6], [7], [], [8, 9]]


def add(order: int, part, total) -> int:
    for place in part:
        total[place % 3] += order * place
    return sum(part)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_workers_comes_to_the_same_sum_in_order(count) -> None:
    with Workers(add, 3, count) as workers:
        for order in (1, 10):  # sums begin anew
            total, said = workers.sum(order, PARTS)
            assert total.tolist() == [order * 18, order * 12, order * 15]
            assert said == [3, 3, 15, 7, 0, 17]


def test_they_are_processes_and_end_with_the_block() -> None:
    with Workers(lambda *_: os.getpid(), 1, 2) as workers:
        pids = set(workers.sum(None, [[0]] * 20)[1])
        assert os.getpid() not in pids
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def refuse(order: str, part, _) -> None:
    if order == "fail" and part == [3]:
        raise DataMissing("no rows")


@pytest.mark.parametrize("count", [1, 2])
def test_what_one_raises_is_raised_and_the_next_round_goes_on(count) -> None:
    with Workers(refuse, 1, count) as workers:
        with pytest.raises(DataMissing, match="no rows"):
            workers.sum("fail", PARTS)
        assert workers.sum("go on", PARTS)[1] == [None] * len(PARTS)


def test_a_killed_worker_is_an_error_that_names_the_remedy() -> None:
    with (
        Workers(lambda *_: os.kill(os.getpid(), signal.SIGKILL), 1, 2) as workers,
        pytest.raises(RoundFailed, match="--threads"),
    ):
        workers.sum(None, PARTS)


MIB = 1 << 20


@pytest.mark.parametrize("keep", [True, False], ids=["held", "given back"])
def test_their_peak_is_what_they_took_themselves_and_not_what_they_share(keep) -> None:
    """What each took is counted once for each; what this process had before, not at all."""
    shared, held = np.ones(300 * MIB, np.uint8), []

    def take(*_) -> None:
        block = np.ones(60 * MIB, np.uint8)
        if keep:
            held.append(block)

    with Workers(take, 1, 2) as workers:
        idle = workers.peak()
        workers.sum(None, [[0], [1]])
        took = workers.peak() - idle
    assert shared[0] == 1
    assert 0 < idle < 60 * MIB
    assert 110 * MIB <= took <= 180 * MIB


def test_a_process_that_does_it_all_takes_nothing_besides() -> None:
    with Workers(add, 3, 1) as workers:
        workers.sum(1, PARTS)
        assert workers.peak() == 0


class Dropping(Digits):
    """Digits for a network that draws at random, so that devices train one by one."""

    def model(self, seed: int) -> nn.Module:
        net = super().model(seed)
        return nn.Sequential(nn.Dropout(0.3), *net.children())


@pytest.mark.parametrize("task", [Digits(), Dropping()], ids=["batched", "one by one"])
def test_a_simulation_comes_to_the_same_weights_whatever_the_workers(task) -> None:
    plan = Plan(
        name="same",
        task="digits",
        model="digits",
        rounds=2,
        cohort=Cohort(min_devices=2),
        privacy=Privacy(mode="plain", noise_multiplier=0.0, clip_norm=5.0),
    )
    population = named("digits", 100, 0).population
    ended, rounds = [], []
    for workers in (1, 2, 3):
        heard: list[simulate.Round] = []
        ended.append(
            simulate.run(
                plan,
                Simulated(task, population),
                60,
                heard.append,
                workers=workers,
                clock=lambda: 0.0,
            )
        )
        rounds.append(heard)
    assert rounds[0] == rounds[1] == rounds[2]
    assert ended[0].beside == 0 < ended[1].beside
    assert all(np.array_equal(ended[0].weights, other.weights) for other in ended[1:])
    assert ended[0].engine == ("batched" if type(task) is Digits else "one by one")
