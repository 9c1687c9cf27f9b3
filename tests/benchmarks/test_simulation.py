"""The benchmark of simulated training measures what it says, on a small cohort."""

import json

import pytest

from benchmarks import simulation


def test_every_network_is_measured_both_ways_and_a_missed_goal_is_the_exit_status(capsys):
    status = simulation.main(["--json", "--devices", "3", "--repeats", "1"])
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
    for name in simulation.OTHERS.values():
        assert f"{name}: left out" in said.err
