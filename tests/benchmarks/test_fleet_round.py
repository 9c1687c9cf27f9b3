"""The benchmark of a round over local devices runs both sides, and judges by its goals."""

import json

import pytest

from benchmarks import fleet_round
from benchmarks.fleet_round import Took


def judged(devices, seconds, memory):
    mine = Took({"plain": seconds, "secagg": 2 * seconds}, memory)
    return fleet_round.rows(devices, mine, Took({"stock": 6.0}, 200_000_000))


def test_goals_are_for_ten_devices_and_hold_for_every_mode_and_for_memory():
    assert [row.met for row in judged(10, 0.6, 150_000_000)] == [True, False, True]
    assert [row.met for row in judged(10, 0.5, 161_000_000)] == [True, True, False]
    assert [row.met for row in judged(9, 5.0, 500_000_000)] == [None, None, None]
    assert [row.ratio for row in judged(10, 0.5, 100_000_000)] == pytest.approx([12, 6, 2])


@pytest.mark.long
def test_both_sides_run_and_a_device_that_waits_has_no_torch(capsys):
    arguments = ["--json", "--devices", "2", "--rounds", "2", "--peer-rounds", "2"]
    assert fleet_round.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["unit"] for row in rows] == ["s", "s", "MB"]
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows)
