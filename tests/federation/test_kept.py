"""What a device carries from round to round: what counted stands, what did not is forgotten."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation.kept import RUNS, Carried, Kept, KeptFiles, KeptHere
from atoll.federation.parameters import Vector

MAKERS: list[Callable[[Path], Kept]] = [KeptFiles, lambda _: KeptHere()]
kinds = pytest.mark.parametrize("make", MAKERS, ids=["files", "here"])


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


@kinds
def test_what_is_saved_last_is_loaded_by_run_and_name(make: Callable[[Path], Kept], tmp_path: Path):
    kept = make(tmp_path)
    assert kept.load("run", "a") is None
    kept.save("run", "a", b"1")
    kept.save("run", "b", b"2")
    kept.save("run", "a", b"3")
    assert (kept.load("run", "a"), kept.load("run", "b")) == (b"3", b"2")
    assert kept.load("other", "a") is None


@kinds
def test_the_latest_runs_are_kept_and_older_ones_forgotten(
    make: Callable[[Path], Kept], tmp_path: Path
):
    kept = make(tmp_path)
    for run in range(RUNS + 2):
        kept.save(f"run-{run}", "a", b"x")
        kept.save("run-in-use", "a", b"x")
    held = [run for run in range(RUNS + 2) if kept.load(f"run-{run}", "a")]
    assert held == list(range(RUNS + 3 - RUNS, RUNS + 2))
    assert kept.load("run-in-use", "a") == b"x"


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b", "..", "\0", "x" * 4096])
def test_a_runs_name_never_leads_out_of_the_directory(name: str, tmp_path: Path):
    kept = KeptFiles(tmp_path / "kept")
    kept.save(name, name, b"1")
    assert kept.load(name, name) == b"1"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_device_begins_with_what_is_fresh_and_again_when_its_file_is_damaged(tmp_path: Path):
    carried = Carried(KeptFiles(tmp_path), "run", "residual")
    assert carried.as_of(0, lambda: vector(7)) == 7
    carried.put(1, vector(7), vector(8))
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:40])
    assert carried.as_of(1, lambda: vector(9)) == 9


def test_of_a_round_asked_again_the_first_answer_is_kept(tmp_path: Path):
    carried = Carried(KeptFiles(tmp_path), "run", "control")
    carried.put(2, vector(1), vector(2))
    carried.put(2, vector(1), vector(3))
    assert carried.as_of(2, lambda: vector(0)) == 2


def test_a_value_survives_its_process(tmp_path: Path):
    Carried(KeptFiles(tmp_path), "run", "residual").put(3, vector(1), vector(2))
    again = Carried(KeptFiles(tmp_path), "run", "residual")
    assert again.as_of(3, lambda: vector(0)) == 2
    assert again.as_of(2, lambda: vector(0)) == 1


@pytest.mark.parametrize("hours", [-48, 48])
def test_the_run_in_use_is_kept_though_the_clock_was_set(tmp_path: Path, hours: int) -> None:
    kept = KeptFiles(tmp_path)
    for run in range(RUNS):
        kept.save(f"old-{run}", "a", b"x")
    for folder in tmp_path.iterdir():
        time = folder.stat().st_mtime + hours * 3600
        os.utime(folder, (time, time))
    for value in (b"1", b"2"):
        kept.save("live", "a", value)
        assert kept.load("live", "a") == value
    assert sum(kept.load(f"old-{run}", "a") is not None for run in range(RUNS)) == RUNS - 1


def test_an_earlier_round_asked_again_takes_nothing_back(tmp_path: Path) -> None:
    carried = Carried(KeptFiles(tmp_path), "run", "residual")
    carried.put(5, vector(1), vector(2))
    carried.put(6, vector(2), vector(3))
    carried.put(5, vector(1), vector(9))
    assert carried.as_of(6, lambda: vector(0)) == 3


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=12))
def test_it_is_the_sum_of_the_rounds_that_counted(rounds: list[tuple[int, bool]]):
    """A device adds the round's number; asked several times for a round, it adds it once."""
    carried, counted, expected = Carried(KeptHere(), "run", "sum"), 0, 0.0
    for number, (times, counts) in enumerate(rounds, start=1):
        for _ in range(times):
            before = carried.as_of(counted, lambda: vector(0))
            assert before == expected
            carried.put(number, before, before + np.float32(number))
        if counts:
            counted, expected = number, expected + number
    assert carried.as_of(counted, lambda: vector(0)) == expected
