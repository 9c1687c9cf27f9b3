import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.fleet.counts import (
    MAX_BINS,
    MAX_COUNT,
    merge,
    pack_all,
    pack_all_signed,
    pack_counts,
    pack_signed,
    unpack_all,
    unpack_all_signed,
    unpack_counts,
    unpack_signed,
)
from atoll.fleet.errors import BadProfile

sparse = st.one_of(st.just(0), st.just(0), st.integers(0, 300), st.integers(0, 2**40))
vectors = hnp.arrays(np.int64, st.integers(1, 100), elements=sparse)


noised = st.one_of(st.integers(-200, 300), st.integers(-MAX_COUNT, MAX_COUNT))
signed_vectors = hnp.arrays(np.int64, st.integers(1, 100), elements=noised)


def sets(bins, elements=sparse):
    return st.dictionaries(
        st.sampled_from("abcd"), hnp.arrays(np.int64, bins, elements=elements), max_size=4
    )


@given(vectors)
def test_counts_survive_packing(counts) -> None:
    packed = pack_counts(counts)
    unpacked = unpack_counts(packed, len(counts))
    assert unpacked.dtype == np.int64
    np.testing.assert_array_equal(unpacked, counts)


def test_a_window_of_few_rows_packs_into_few_bytes() -> None:
    counts = np.bincount(np.random.default_rng(0).integers(0, 64, 20), minlength=65)
    assert len(pack_counts(counts.astype(np.int64))) < 50


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_bytes_are_the_packing_of_what_they_unpack_to_or_refused(data) -> None:
    try:
        counts = unpack_counts(data)
    except BadProfile:
        return
    assert counts.min() >= 0
    assert pack_counts(counts) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x03\x00",
        b"\x03\x00\x00",
        b"\x03\x03\x01",
        b"\x03\x01\x01\x01\x01",
        b"\x03\x00\x80",
        b"\x83\x00\x00\x01",
        b"\x03\x00" + b"\xff" * 9 + b"\x01",
        b"\x03\x00" + b"\xff" * 1000,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x03\xff\xff\xff\xff\xff\xff\xff\x7f\x01",
    ],
)
def test_hostile_packings_are_refused(data) -> None:
    with pytest.raises(BadProfile):
        unpack_counts(data)


def test_counts_of_another_number_of_bins_are_refused() -> None:
    with pytest.raises(BadProfile, match="3 bins; expected 4"):
        unpack_counts(pack_counts(np.zeros(3, np.int64)), 4)


@pytest.mark.parametrize(
    "counts",
    [
        np.array([], np.int64),
        np.array([-1]),
        np.array([MAX_COUNT + 1]),
        np.array([1.0]),
        np.zeros((2, 2), np.int64),
        np.zeros(MAX_BINS + 1, np.int64),
    ],
)
def test_what_is_no_count_vector_is_not_packed(counts) -> None:
    with pytest.raises(BadProfile):
        pack_counts(counts)


@given(signed_vectors)
def test_counts_with_noise_survive_packing(counts) -> None:
    unpacked = unpack_signed(pack_signed(counts), len(counts))
    assert unpacked.dtype == np.int64
    np.testing.assert_array_equal(unpacked, counts)


def test_the_signed_form_is_zigzag_after_a_zero() -> None:
    counts = np.array([0, -1, 1, -2, 63, -64, 64], np.int64)
    assert pack_signed(counts) == bytes([0, 7, 0, 1, 2, 3, 126, 127, 128, 1])


@settings(max_examples=500)
@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda tail: b"\0\4" + tail))
def test_any_bytes_are_the_signed_packing_of_what_they_unpack_to_or_refused(data) -> None:
    try:
        counts = unpack_signed(data)
    except BadProfile:
        return
    assert np.abs(counts).max() <= MAX_COUNT
    assert pack_signed(counts) == data


@given(signed_vectors)
def test_neither_form_is_ever_taken_for_the_other(counts) -> None:
    # A reader from before there was noise is unpack_counts.
    with pytest.raises(BadProfile, match="0 bins"):
        unpack_counts(pack_signed(counts))
    with pytest.raises(BadProfile, match="no noise"):
        unpack_signed(pack_counts(np.abs(counts)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x00\x00",
        b"\x00\x02\x01",
        b"\x00\x02\x01\x01\x01",
        b"\x00\x01\x80",
        b"\x00\x01\x80\x00",
        b"\x00\x01" + b"\xff" * 7 + b"\x7f",
        b"\x00\x01" + b"\xff" * 9 + b"\x01",
        b"\x00\xff\xff\xff\x7f\x01",
    ],
)
def test_hostile_signed_packings_are_refused(data) -> None:
    with pytest.raises(BadProfile):
        unpack_signed(data)


def test_signed_counts_of_another_number_of_bins_or_out_of_range_are_refused() -> None:
    with pytest.raises(BadProfile, match="3 bins; expected 4"):
        unpack_signed(pack_signed(np.zeros(3, np.int64)), 4)
    with pytest.raises(BadProfile, match="between"):
        pack_signed(np.array([-MAX_COUNT - 1]))


def _same(one, other) -> bool:
    return one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


@given(*[sets(5) | sets(5, st.integers(-(2**40), 2**40))] * 3)
def test_merging_is_associative_and_commutative(a, b, c) -> None:
    assert _same(merge(a, b), merge(b, a))
    assert _same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert _same(merge(a, {}), a)


@given(sets(4), sets(4))
def test_merging_adds_and_changes_neither_side(a, b) -> None:
    kept = {name: counts.copy() for name, counts in a.items()}
    merged = merge(a, b)
    for name, counts in merged.items():
        zero = np.zeros(4, np.int64)
        np.testing.assert_array_equal(counts, a.get(name, zero) + b.get(name, zero))
    assert _same(a, kept)


def test_merging_refuses_other_bins_and_overflow() -> None:
    with pytest.raises(BadProfile, match="cannot be merged"):
        merge({"a": np.zeros(2, np.int64)}, {"a": np.zeros(3, np.int64)})
    full = {"a": np.array([MAX_COUNT])}
    with pytest.raises(BadProfile, match="between"):
        merge(full, full)


@given(sets(6))
def test_a_set_survives_packing_and_must_be_complete(counts) -> None:
    bins = dict.fromkeys(counts, 6)
    assert _same(unpack_all(pack_all(counts), bins), counts)
    assert _same(unpack_all(pack_all(counts)), counts)
    with pytest.raises(BadProfile, match="disagree"):
        unpack_all(pack_all(counts), {**bins, "more": 6})


@given(sets(6, noised))
def test_a_set_with_noise_survives_packing_and_must_be_complete(counts) -> None:
    bins = dict.fromkeys(counts, 6)
    assert _same(unpack_all_signed(pack_all_signed(counts), bins), counts)
    with pytest.raises(BadProfile, match="disagree"):
        unpack_all_signed(pack_all_signed(counts), {**bins, "more": 6})
