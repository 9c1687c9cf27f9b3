"""The benchmarks of the engine and of aggregation measure what they say, on small cohorts."""

import json
import os

import pytest

from benchmarks import aggregation, engine, process


def test_every_size_of_model_is_measured_and_a_missed_goal_is_the_exit_status(capsys):
    arguments = ["--json", "--parameters", "50,8000", "--devices", "3", "--rounds", "2", "--alone"]
    status = engine.main(arguments)
    rows = json.loads(capsys.readouterr().out)
    assert status == any(row["met"] is False for row in rows)
    assert [row["goal"] for row in rows] == [None, None, 0.5, None]
    assert all(row["ours"] > 0 for row in rows)


def test_a_round_without_some_of_the_devices_is_no_result():
    assert len(engine.seconds_a_round(50, 3, 2)) == 2
    with pytest.raises(AssertionError, match="outside"):
        engine.seconds_a_round(50, 3, 1, value=1 << 40)


def test_aggregation_is_measured_against_every_yardstick(capsys):
    assert aggregation.main(["--json", "--parameters", "3000", "--updates", "4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["goal"] for row in rows} == {None}
    assert {row["peer_name"] for row in rows} == {
        "float32 +=",
        "Flower's aggregate_arrayrecords, float32",
        "the same with 4 devices",
        None,
    }
    for row in rows:
        if row["peer"] is not None:
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])


def test_goals_are_set_for_a_thousand_updates_of_a_million():
    assert aggregation.wanted(1_000_000, 1000)
    assert not aggregation.wanted(1_000_000, 999)
    assert not aggregation.wanted(999_999, 1000)


def test_what_runs_apart_runs_in_a_process_of_its_own():
    assert process.apart(os.getpid) != os.getpid()
