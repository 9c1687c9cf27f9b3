"""The running total is the sum in 64 bits, of terms that keep to the bound and of no others."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atoll.privacy import frames, running, terms
from atoll.privacy.errors import Refused
from atoll.privacy.running import RunningTotal
from atoll.privacy.sums import RoundKey, SumSpec
from benchmarks import process

sys.path.insert(0, str(Path(__file__).parents[1]))

import peaks  # after the path

STRETCH = running._STRETCH


def spec(length, bound, parties):
    return SumSpec(RoundKey("run", 1), length, bound, parties, 1)


@given(
    st.sampled_from([1, 126, 127, 128, 32_767, 32_768, 2**31 - 1, 2**31, 2**40]),
    st.sampled_from([1, 9, STRETCH - 1, STRETCH, STRETCH + 1, 3 * STRETCH + 5]),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
@example(bound=2**29, length=3 * STRETCH, parties=4, seed=1)  # one more than 32 bits hold
@settings(max_examples=60)
def test_it_is_the_sum_at_any_bound_length_and_number_of_parties(bound, length, parties, seed):
    rng = np.random.default_rng(seed)
    total = RunningTotal(spec(length, bound, parties))
    wanted = np.zeros(length, np.int64)
    for party in range(parties):
        # At the edges: that is where a sum leaves what holds it.
        term = rng.integers(-bound, bound, length, endpoint=True)
        term[: length // 2] = bound if party != 2 else -bound
        total.add(term.astype(terms.dtype(bound)))
        wanted += term
    found = total.values()
    assert found.dtype == np.int64
    assert np.array_equal(found, wanted)


@given(st.sampled_from([100, 127, 32_767, 40_000, 2**31 - 1]), st.sampled_from([-1, 1]), st.data())
def test_nothing_stays_of_a_term_with_a_value_outside_the_bound(bound, sign, data):
    length = 2 * STRETCH + 3
    rng = np.random.default_rng(bound)
    good, bad = rng.integers(-bound, bound, (2, length), endpoint=True)
    narrow = terms.dtype(bound)
    # A type of two's complement holds one more below zero than above it.
    outside = -bound - 1 if bound == np.iinfo(narrow).max else sign * (bound + 1)
    bad[data.draw(st.sampled_from([0, STRETCH - 1, STRETCH, length - 1]))] = outside
    total = RunningTotal(spec(length, bound, 3))
    total.add(good.astype(narrow))
    with pytest.raises(Refused, match="outside"):
        total.add(bad.astype(narrow))
    total.add(good.astype(narrow))
    assert np.array_equal(total.values(), 2 * good)


def test_it_takes_two_models_of_memory_at_its_end_and_no_more():
    length = 32 * STRETCH
    held, most = process.apart(peaks.of_total, length, 3)
    assert held == 2 * 4 * length
    assert most <= 1.05 * held


@given(st.text(max_size=20), st.integers(1, 9))
def test_a_frames_first_part_lies_where_integers_may(text, count):
    data = frames.pack({"text": text}, [np.arange(count).tobytes()])
    (part,) = frames.view(data).parts
    assert np.frombuffer(part, np.int64).tolist() == list(range(count))
    assert (len(data) - len(part)) % 8 == 0
