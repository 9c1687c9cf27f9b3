"""Neighbourhoods are symmetric, regular and connected, and their bounds are the known ones."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.privacy import agreement, graph


def names(size):
    return sorted(f"device-{number}" for number in range(size))


@pytest.mark.parametrize("size", [1, 2, 5, graph.COMPLETE])
def test_small_cohorts_are_complete(size):
    near = graph.neighbours(names(size), b"x")
    assert near == {name: [n for n in names(size) if n != name] for name in names(size)}


@given(st.integers(graph.COMPLETE + 1, 160), st.binary(max_size=8))
@settings(max_examples=20)
def test_larger_ones_are_symmetric_and_of_much_the_same_degree(size, seed):
    near = graph.neighbours(names(size), seed)
    assert near == graph.neighbours(names(size)[::-1], seed)
    assert all(name in near[other] for name, found in near.items() for other in found)
    assert all(name not in found for name, found in near.items())
    degrees = [len(found) for found in near.values()]
    assert max(degrees) <= 2 * graph.CYCLES
    assert min(degrees) >= graph.CYCLES


def test_the_graph_follows_from_the_seed():
    assert graph.neighbours(names(200), b"one") != graph.neighbours(names(200), b"other")


def test_the_graph_is_an_expander():
    size = 300
    near = graph.neighbours(names(size), b"seed")
    place = {name: at for at, name in enumerate(names(size))}
    adjacency = np.zeros((size, size))
    for name, found in near.items():
        for other in found:
            adjacency[place[name], place[other]] = 1
    *_, second, first = np.sort(np.abs(np.linalg.eigvalsh(adjacency)))
    degree = adjacency.sum() / size
    assert first == pytest.approx(degree, rel=0.02)
    # Of a random regular graph it is about 2·√(degree - 1) (Friedman 2008); a ring with its
    # nearest places as neighbours has one close to the degree.
    assert second < 2.3 * np.sqrt(degree - 1)


def test_whichever_half_is_gone_the_rest_hangs_together():
    drawn = np.random.default_rng(7)
    near = graph.neighbours(names(200), b"seed")
    for _ in range(50):
        left = drawn.choice(names(200), 100, replace=False).tolist()
        assert graph.connected(near, left)


def test_parts_that_no_edge_joins_are_told():
    near = {"a": ["b"], "b": ["a"], "c": ["d"], "d": ["c"]}
    assert graph.connected(near, ["a", "b"])
    assert not graph.connected(near, ["a", "b", "c"])
    assert graph.connected(near, ["d"])


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_threshold_is_a_majority_that_can_be_reached(count, survivors):
    for enough in (
        graph.threshold(count, count, survivors),
        graph.threshold(count, 1000, survivors),
        agreement.quorum(count, survivors),
    ):
        assert count < 2 * enough
        assert enough <= count
    assert agreement.quorum(count, survivors) >= min(survivors, count)


def test_the_bound_on_bad_neighbourhoods_is_the_hypergeometric_one():
    # Two neighbours of three others, one of whom is bad: half a neighbourhood with probability 2/3.
    assert graph.overrun(4, 1, 2) == 1.0
    wanted = 1000 * sum(comb(200, k) * comb(799, 70 - k) for k in range(35, 71)) / comb(999, 70)
    assert graph.overrun(1000, 200, 70) == pytest.approx(wanted, rel=1e-9)
    assert graph.overrun(1000, 200, 70) < 1e-5  # as the docstring of CYCLES says
    assert min(map(len, graph.neighbours(names(1000), b"some").values())) >= 70


def test_the_bound_holds_in_graphs_that_were_drawn():
    drawn = np.random.default_rng(5)
    size, bad = 120, 40
    hits, bound = 0, 0.0
    for trial in range(60):
        marked = set(drawn.choice(names(size), bad, replace=False).tolist())
        near = graph.neighbours(names(size), trial.to_bytes(4))
        hits += any(len(marked & set(found)) >= (len(found) + 1) // 2 for found in near.values())
        bound += graph.overrun(size, bad, min(map(len, near.values())))
    assert hits <= bound
