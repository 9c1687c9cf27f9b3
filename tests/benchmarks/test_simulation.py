"""The benchmark of simulated training measures what it says, on a small cohort."""

import json
import sys

import numpy as np
import pytest

from benchmarks import simulation
from benchmarks.peers import environments
from benchmarks.peers.environments import PeerMissing


def test_every_network_is_measured_both_ways_and_a_missed_goal_is_the_exit_status(capsys):
    status = simulation.main(["--json", "--alone", "--devices", "3", "--repeats", "1"])
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert status == any(row["met"] is False for row in rows)
    assert len(rows) == len(simulation.CASES)
    for row, case in zip(rows, simulation.CASES, strict=True):
        assert row["case"].startswith(f"{case.name}: 3 devices")
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert (row["goal"] is None) == (row["met"] is None)
    # The large one is measured, and is not what a simulation would train together.
    assert [row["goal"] is None for row in rows] == [True, False, False]


def test_a_whole_round_is_run_and_timed_and_its_result_written(tmp_path) -> None:
    simulation._write(tmp_path, 2)
    given = {"folder": str(tmp_path), "cohort": 2, "batch": 25, "rate": 0.1, "workers": 1}
    given |= {"dropout": 0.0, "warm": 1, "rounds": 1, "result": str(tmp_path / "ours.npy")}
    said = environments.measured([sys.executable, "-m", "benchmarks.cifar"], given)
    assert len(said["seconds"]) == 1
    assert said["peak_bytes"] > 50e6
    before, after = np.load(tmp_path / "weights.npy"), np.load(tmp_path / "ours.npy")
    assert before.shape == after.shape
    assert 0 < np.abs(after - before).max() < 1


def test_a_peer_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(environments.ProgramFailed, match="not today"):
        environments.measured([sys.executable, "-c", "raise SystemExit('not today')"], {})
    with pytest.raises(environments.ProgramFailed, match="JSON"):
        environments.measured([sys.executable, "-c", "print('done')"], {})


def test_a_peer_that_is_missing_is_a_row_and_a_missed_goal_is_missed() -> None:
    best = {"seconds": [0.5, 0.4], "peak_bytes": 2e6}
    (row,) = simulation._rows("case", "pfl", 2.5, best, PeerMissing("no network"))
    assert (row.met, row.peer, row.peer_name) == (None, None, "pfl-research 0.6: not measured")
    for theirs, met in ((0.8, True), (0.79, False)):
        found = ("threads: 2", {"seconds": [1.0, theirs], "peak_bytes": 4e6})
        speed, memory = simulation._rows("case", "pfl", 2.5, best, found)
        assert speed.ratio == pytest.approx(2.5 * theirs)
        assert (speed.met, memory.ratio) == (met, 2.0)
