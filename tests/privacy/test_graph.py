"""Neighbourhoods are symmetric, regular and connected, and their bounds are the known ones."""

from math import comb

import numpy as np
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
    degree = min(graph.DEGREE, (size - 1) // 2 * 2)
    assert {len(found) for found in near.values()} == {degree}
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
def test_a_threshold_is_a_majority_that_can_be_reached(count, survivors):
    for enough in (graph.threshold(count, survivors), graph.quorum(count, survivors)):
        assert count < 2 * enough
        assert enough <= count
    assert graph.quorum(count, survivors) >= min(survivors, count)


def test_the_bound_on_bad_neighbourhoods_is_the_hypergeometric_one():
    # One bad device of 98 others, in a neighbourhood of 80: it is in it with probability 80/98.
    assert graph.overrun(99, 1, 2) == 0.0
    assert graph.overrun(99, 1, 1) == 1.0  # 99 times 80/98: the union bound says nothing here
    wanted = 1000 * sum(comb(200, k) * comb(799, 80 - k) for k in range(41, 81)) / comb(999, 80)
    assert graph.overrun(1000, 200, 41) == pytest.approx(wanted, rel=1e-9)
    assert graph.overrun(1000, 200, 41) < 1e-6  # as the docstring of DEGREE says


def test_the_bound_holds_in_graphs_that_were_drawn():
    drawn = np.random.default_rng(5)
    size, bad, limit = 120, 30, 27
    hits = 0
    for trial in range(200):
        marked = set(drawn.choice(names(size), bad, replace=False).tolist())
        seed = trial.to_bytes(4)
        some = names(size)[::10]
        hits += any(
            len(marked & set(graph.neighbours(names(size), name, seed))) >= limit for name in some
        )
    assert hits / 200 <= graph.overrun(size, bad, limit) * 1.5
