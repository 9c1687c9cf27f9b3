import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.fleet import ranges
from atoll.fleet.errors import BadProfile

floats = st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), max_size=40)
parts = st.lists(floats, min_size=1, max_size=6)


def _observe(values):
    return ranges.observe(np.array(values, dtype=np.float32))


@settings(max_examples=200)
@given(parts, st.randoms())
def test_merging_in_any_order_and_grouping_equals_observing_everything_at_once(lists, random):
    whole = _observe([value for part in lists for value in part])
    heap = [_observe(part) for part in lists]
    while len(heap) > 1:
        random.shuffle(heap)
        heap.append(ranges.merge(heap.pop(), heap.pop()))
    assert heap[0] == whole


@settings(max_examples=200)
@given(floats)
def test_the_thresholds_hold_every_value_within_one_bin(values):
    histogram = _observe(values)
    finite = [float(np.float32(v)) for v in values if np.isfinite(v)]
    if len(finite) < len(values) or not finite:
        with pytest.raises(BadProfile):
            ranges.thresholds(histogram)
        return
    low, high = ranges.thresholds(histogram)
    unit = 2.0**histogram.exponent
    assert low <= min(finite) < low + unit
    assert high - unit <= max(finite) < high
    assert histogram.total == len(finite)


@given(floats)
def test_packing_keeps_the_histogram(values):
    histogram = _observe(values)
    assert ranges.unpack(ranges.pack(histogram)) == histogram


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_bytes_from_anyone_are_a_histogram_or_refused(data):
    try:
        found = ranges.unpack(data)
    except BadProfile:
        return
    assert ranges.unpack(ranges.pack(found)) == found


def test_bins_stay_few_however_far_the_values_spread():
    histogram = ranges.observe(np.array([1e-30, -1e30, 3e38], dtype=np.float32))
    assert histogram.counts.size <= ranges.MAX_BINS
    assert histogram.total == 3


def test_a_share_cuts_both_tails():
    values = np.concatenate([np.full(98, 0.5), [-100.0], [100.0]]).astype(np.float32)
    low, high = ranges.thresholds(ranges.observe(values), share=0.97)
    assert -1 < low <= 0.5 < high < 1


def test_an_even_spread_is_cut_at_its_percentiles():
    values = np.linspace(-1, 1, 100_001)
    low, high = ranges.thresholds(ranges.observe(values), share=0.9)
    assert low == pytest.approx(-0.9, abs=2e-3)
    assert high == pytest.approx(0.9, abs=2e-3)


def test_merging_with_nothing_changes_nothing():
    histogram = _observe([1.0, 2.0])
    assert (
        ranges.merge(ranges.EMPTY, histogram) == histogram == ranges.merge(histogram, ranges.EMPTY)
    )
