"""The training process: which task it takes, whose data it reads, whom it trusts."""

import bench
import numpy as np
import pytest

from atoll.edge_agent import credentials
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import AgentError
from atoll.edge_agent.trainer import AnsweredDurably, choose, examples, party_of
from atoll.federation.errors import BadGroups, TaskMissing
from atoll.federation.task import Examples
from atoll.privacy.errors import BadParameters, Refused


def test_without_data_the_reason_and_the_remedy_are_told(tmp_path):
    with pytest.raises(AgentError, match=f"{tmp_path}.*put this device's data there"):
        choose(None, tmp_path)


def test_a_task_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(TaskMissing, match="no-such-task"):
        choose("no-such-task", tmp_path)


def test_a_split_is_read_once(tmp_path):
    class Counting:
        name, input_shape, channels, classes = "c", bench.SHAPE, bench.CHANNELS, bench.CLASSES
        loads = 0

        def model(self, seed):
            raise AssertionError("reading a split needs no model")

        def load(self, data, split):
            self.loads += 1
            return Examples(bench.examples(3), np.arange(3))

    task = Counting()
    read = examples(task, tmp_path)
    assert read("train").y.tolist() == read("train").y.tolist() == [0, 1, 2]
    assert task.loads == 1
    read("test")
    assert task.loads == 2


def test_groups_are_read_with_the_examples_of_a_task_that_has_them(tmp_path):
    class Grouped:
        name, input_shape, channels, classes = "g", bench.SHAPE, bench.CHANNELS, bench.CLASSES
        groups = ("young", "old")

        def model(self, seed):
            raise AssertionError("reading a split needs no model")

        def load(self, data, split):
            return Examples(bench.examples(3), np.arange(3))

        def group_of(self, data, split):
            return np.array([1, 0, -1] if split == "test" else [0, 0, 2])

    read = examples(Grouped(), tmp_path)
    assert read("test").group.tolist() == [1, 0, -1]
    assert read("test").groups == 2
    with pytest.raises(BadGroups):
        read("train")


def test_sides_of_sums_are_made_by_mode_with_this_devices_name(hub, tmp_path):
    paths = bench.enrolled(hub, tmp_path / "d")
    party = party_of(paths, credentials.load(paths), allow_plain=True)
    assert party("plain") is not party("plain")
    with pytest.raises(BadParameters):
        party("shouting")


def test_a_device_sends_no_update_in_the_clear_unless_it_was_told_to(hub, tmp_path):
    paths = bench.enrolled(hub, tmp_path / "d")
    party = party_of(paths, credentials.load(paths), allow_plain=False)
    with pytest.raises(Refused, match="--allow-plain"):
        party("plain")
    party("he")


def test_the_last_round_answered_outlives_the_process(tmp_path):
    database = Database(tmp_path / "agent.db")
    AnsweredDurably(database).note("run", 7)
    database.close()
    again = AnsweredDurably(Database(tmp_path / "agent.db"))
    assert (again.last("run"), again.last("other")) == (7, 0)
