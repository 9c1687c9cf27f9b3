"""Folds test every person, or every stretch of time, once, and never what has been trained on."""

import numpy as np
import pytest

from atoll.simulations import populations, spar_folds
from atoll.simulations.spar import TEST_STEP, TRAIN_STEP, WINDOW
from atoll.simulations.spar_folds import FOLDS, Recording


def sets(people=10, length=1500):
    """Recordings in which each value says whose it is and when it was."""
    made = []
    for person in range(people):
        signal = np.zeros((length, 6), np.float32)
        signal[:, 0] = person
        signal[:, 1] = np.arange(length)
        made.append(Recording(person, person % 7, signal))
    return made


def test_in_time_everybody_trains_and_no_sample_is_on_both_sides():
    tested = set()
    for fold in range(FOLDS):
        dealt = spar_folds.in_time(sets(), fold)
        assert dealt.size == 10
        (test,) = populations.evaluated_on(dealt, 50)
        times = set(np.unique(test.x[:, 1]).astype(int))
        assert not times & tested
        tested |= times
        for device in range(dealt.size):
            held = dealt.examples(device, "train")
            assert set(np.unique(held.x[:, 0])) == {device}
            assert set(held.y) == {device % 7}
            assert not times & set(np.unique(held.x[:, 1]).astype(int))
    # A fifth is 300 samples: windows end within a step of its end.
    assert len(tested) > FOLDS * (300 - TEST_STEP)


def test_people_are_tested_once_and_by_those_who_never_met_them():
    seen = []
    for fold in range(FOLDS):
        dealt = spar_folds.of_people(sets(), fold)
        (test,) = populations.evaluated_on(dealt, 50)
        unseen = set(np.unique(test.x[:, 0]))
        held = [dealt.examples(device, "train") for device in range(dealt.size)]
        assert len(held) == 8
        assert not unseen & {person for one in held for person in np.unique(one.x[:, 0])}
        seen += sorted(unseen)
        assert len(held[0].y) == (1500 - WINDOW) // TRAIN_STEP + 1
    assert seen == list(range(10))


@pytest.fixture(scope="module")
def recorded():
    return spar_folds.recordings()


def test_the_recordings_are_ten_peoples_seven_exercises_with_each_arm(recorded):
    assert len(recorded) == 10 * 7 * 2
    for person in range(1, 11):
        mine = [one.exercise for one in recorded if one.person == person]
        assert sorted(mine) == sorted([*range(7)] * 2)


def test_every_fold_has_all_exercises_on_both_sides(recorded):
    for fold in range(FOLDS):
        for dealt in (spar_folds.in_time(recorded, fold), spar_folds.of_people(recorded, fold)):
            assert set(dealt.tested_on.y) == set(range(7))
            assert all(set(one.y) == set(range(7)) for one in dealt.held)
