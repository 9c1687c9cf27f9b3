"""A device is told the last round in whose sum its term is, whatever became of the others."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from blobs import Blobs
from cohorts import Fleet, fleet, plan_of
from flwr.app import Message

from atoll.federation import messages
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.engine import InProcessGrid
from atoll.federation.run import RoundReport
from atoll.federation.task import Examples, Split


class Listening(InProcessGrid):
    """Remembers what each device was told in each round, and the records it was told in."""

    def __init__(self, apps: dict[int, object]) -> None:
        super().__init__(apps)
        self.told: dict[int, dict[str, int]] = {}
        self.work: dict[int, set[int]] = {}

    def push_messages(self, messages_: Iterable[Message]) -> Iterable[str]:
        asked = list(messages_)
        for message in asked:
            if message.metadata.message_type == messages.TRAIN:
                ask = messages.unpack(message.content, messages.SumAsk)
                weights = messages.unpack(message.content, messages.TrainAsk).weights
                self.told.setdefault(ask.round, {})[ask.party] = ask.counted
                self.work.setdefault(ask.round, set()).add(id(weights))
        return super().push_messages(asked)


class BrokenIn(Blobs):
    """Cannot load its examples the ``fault``-th time that it trains."""

    def __init__(self, *faults: int) -> None:
        self._faults, self._calls = faults, 0

    def load(self, data: Path, split: Split) -> Examples:
        self._calls += 1
        if self._calls in self._faults:
            raise OSError("the disk is gone")
        return super().load(data, split)


def listening(folder: Path, devices: int, tasks: dict[str, Blobs]) -> Fleet:
    here = fleet(folder, devices, tasks)
    return Fleet(Listening(here.grid._apps), here.cohort)


@pytest.mark.parametrize("mode", ["plain", "he", "secagg"])
def test_the_last_round_that_counted_is_told_in_the_next(tmp_path: Path, mode: str) -> None:
    here = listening(tmp_path, 4, {"device-2": BrokenIn(2, 3), "device-3": BrokenIn(1)})
    here.run(plan_of(mode, count=4))
    assert here.grid.told == {
        1: {"device-1": 0, "device-2": 0, "device-3": 0, "device-4": 0},
        2: {"device-1": 1, "device-2": 1, "device-3": 0, "device-4": 1},
        3: {"device-1": 2, "device-2": 1, "device-3": 2, "device-4": 2},
        4: {"device-1": 3, "device-2": 1, "device-3": 3, "device-4": 3},
    }


def test_the_weights_are_held_once_for_all_devices(tmp_path: Path) -> None:
    here = listening(tmp_path, 3, {})
    here.run(plan_of(count=2))
    assert [len(held) for held in here.grid.work.values()] == [1, 1]


def test_a_round_that_was_thrown_away_counts_for_nobody(tmp_path: Path) -> None:
    here = listening(tmp_path, 3, {"device-1": BrokenIn(2), "device-2": BrokenIn(2)})
    here.run(plan_of(count=3))
    assert here.grid.told[3] == dict.fromkeys(("device-1", "device-2", "device-3"), 1)


def test_a_run_taken_up_again_says_what_the_undisturbed_one_says(tmp_path: Path) -> None:
    def tasks() -> dict[str, Blobs]:
        return {"device-2": BrokenIn(2)}

    undisturbed = listening(tmp_path / "a", 3, tasks())
    undisturbed.run(plan_of(count=4))
    here, checkpoints = listening(tmp_path / "b", 3, tasks()), Checkpoints(tmp_path / "run")

    def stop(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(plan_of(count=4), on_round=stop, checkpoints=checkpoints)
    assert checkpoints.load("run").counted == {"device-1": 2, "device-2": 1, "device-3": 2}
    here.run(plan_of(count=4), checkpoints=checkpoints)
    assert here.grid.told == undisturbed.grid.told


def test_a_checkpoint_from_before_devices_carried_anything_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fleet(tmp_path, 3).run(plan_of(count=1), checkpoints=checkpoints)
    with np.load(tmp_path / "last.npz") as file:
        older = {name: file[name] for name in file.files if name != "counted"}
    np.savez(tmp_path / "last.npz", **older)
    assert checkpoints.load("run").counted == {}
