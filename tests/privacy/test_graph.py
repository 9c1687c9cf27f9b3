"""Neighbourhoods are symmetric, regular and connected, and their bounds are the known ones."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.privacy import graph


def names(size):
    return sorted(f"device-{number}" for number in range(size))


@pytest.mark.parametrize("size", [1, 2, 5, graph.COMPLETE])
def test_small_cohorts_are_complete(size):
    for name in names(size):
        assert graph.neighbours(names(size), name, b"x") == [n for n in names(size) if n != name]


@given(st.integers(graph.COMPLETE + 1, 120), st.binary(max_size=8))
def test_larger_ones_are_regular_and_symmetric(size, seed):
    near = {name: set(graph.neighbours(names(size), name, seed)) for name in names(size)}
    assert {len(found) for found in near.values()} == {graph.DEGREE}
    assert all(name in near[other] for name, found in near.items() for other in found)
    assert all(name not in found for name, found in near.items())


def test_the_graph_follows_from_the_seed_and_hangs_together():
    one = {name: graph.neighbours(names(200), name, b"one") for name in names(200)}
    other = {name: graph.neighbours(names(200), name, b"other") for name in names(200)}
    assert one != other
    reached, edge = set(), ["device-0"]
    while edge:
        name = edge.pop()
        if name not in reached:
            reached.add(name)
            edge += one[name]
    assert reached == set(names(200))


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_threshold_is_a_majority_that_can_be_reached(holders, survivors):
    enough = graph.threshold(holders, survivors)
    assert 2 * enough > holders
    assert enough <= holders
    if holders <= graph.COMPLETE:
        assert enough >= min(survivors, holders)


def test_the_bound_on_bad_neighbourhoods_is_the_hypergeometric_one():
    # One bad device of 34 others, in a neighbourhood of 32: it is in it with probability 32/33.
    assert graph.overrun(34, 1, 1) == 1.0
    wanted = 100 * sum(comb(33, k) * comb(66, 32 - k) for k in range(23, 33)) / comb(99, 32)
    assert graph.overrun(100, 33, 23) == pytest.approx(wanted, rel=1e-12)
    assert graph.overrun(100, 33, 23) < 1e-3
