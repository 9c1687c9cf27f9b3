"""The benchmark of private sums measures what it says, on sums small enough for a test."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from atoll.privacy import modes
from atoll.privacy.errors import BadParameters
from atoll.privacy.sums import CONTRIBUTE, Total
from benchmarks import cohort, process, secure_sum
from benchmarks.peers import ckks

sys.path.insert(0, str(Path(__file__).parents[1]))

import peaks  # after the path

WANTED = [mode for mode in secure_sum.SETTINGS if mode in modes.MODES]


def test_every_mode_is_measured_at_every_setting_and_a_missed_goal_is_the_exit_status(capsys):
    status = secure_sum.main(["--json", "--parameters", "50", "--devices", "3"])
    rows = json.loads(capsys.readouterr().out)
    assert status == any(row["met"] is False for row in rows)
    cases = {row["case"] for row in rows}
    assert cases == {
        f"{mode}, 50 parameters, 3 devices, {setting}"
        for mode in WANTED
        for setting in secure_sum.SETTINGS[mode]
    }
    assert all(row["ours"] > 0 for row in rows if "memory" not in row["metric"])
    for row in rows:
        assert (row["goal"] is None) == (row["met"] is None)
        if row["peer"] is not None:
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])


@pytest.fixture(scope="module", params=modes.MODES)
def measured(request):
    case = cohort.Case(request.param, 200_000, 3, 1000, 2, 1)
    return case, cohort.measure(case)


def test_a_contribution_is_at_least_as_large_as_what_it_says(measured):
    case, took = measured
    bits = np.log2(2 * case.bound + 1)
    assert took.phases[CONTRIBUTE].up * 8 >= case.parameters * bits
    assert took.phases[CONTRIBUTE].mean_up == pytest.approx(took.phases[CONTRIBUTE].up, rel=1e-3)


def test_the_hub_and_the_device_hold_at_least_the_sum_and_a_term(measured):
    case, took = measured
    assert took.hub_peak >= 8 * case.parameters
    assert took.device_peak >= 8 * case.parameters


def test_a_wrong_sum_is_no_result():
    case = cohort.Case("plain", 10, 3, 1000, 2, 1)
    values = np.sum([cohort.term(case, 1, name) for name in case.names], axis=0)
    cohort.check(case, 1, Total(values, case.names))
    with pytest.raises(AssertionError, match="a wrong sum"):
        cohort.check(case, 1, Total(values + (np.arange(10) == 7), case.names))
    with pytest.raises(AssertionError, match="without some"):
        cohort.check(case, 1, Total(values, case.names[1:]))


def test_what_no_plan_may_ask_for_is_not_measured():
    with pytest.raises(BadParameters, match="too few for 1000000 values"):
        secure_sum.case_of("he", secure_sum.Setting(9, 1), 1_000_000, 10)


def test_peak_memory_counts_what_is_freed_again_and_starts_anew():
    size = 64 << 20
    before, most, later = process.apart(peaks.resident, size)
    assert most - before > 0.9 * size
    assert later < most - 0.5 * size


@pytest.mark.parametrize("parameters", [20, 999, 10_000, 1_000_000])
def test_the_peers_tensors_are_the_whole_model(parameters):
    sizes = ckks.tensors(parameters)
    assert sum(sizes) == parameters
    assert min(sizes) > 0


def test_the_peer_takes_a_ciphertext_of_two_primes_for_each_4096_values():
    costs = ckks.measure(3000, 1)
    ciphertexts = sum(-(-size // 4096) for size in ckks.tensors(3000))
    words = 2 * 8192 * (60 + 40) / 8  # two polynomials, modulo primes of 60 and of 40 bits
    assert costs.size == pytest.approx(ciphertexts * words, rel=0.2)
