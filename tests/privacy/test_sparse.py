"""Sparse terms: the same term comes back, in fewer bytes, and nothing else is taken for one."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sum_protocol import NAMES, Cohort

from atoll.privacy import frames, sparse, terms
from atoll.privacy.errors import Refused
from atoll.privacy.sums import CONTRIBUTE
from benchmarks import process

sys.path.insert(0, str(Path(__file__).parents[1]))

import peaks  # after the path


@st.composite
def sparse_terms(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Return terms of any length and any share of zeros, values up to their bound."""
    length, seed = draw(st.integers(1, 3000)), draw(st.integers(0, 2**32))
    bound = draw(st.sampled_from([1, 127, 128, 32_767, 40_000, 2**40]))
    rng = np.random.default_rng(seed)
    values = rng.integers(-bound, bound, length, endpoint=True)
    values[rng.uniform(size=length) > draw(st.sampled_from([0.0, 0.001, 0.02, 0.2, 0.9, 1.0]))] = 0
    return values, bound


@given(sparse_terms())
@settings(max_examples=300)
def test_a_term_comes_back_and_never_takes_more_than_densely(term: tuple[np.ndarray, int]) -> None:
    values, bound = term
    parts = sparse.to_parts(values, values.size, bound)
    read = sparse.view(parts, values.size, bound)
    assert read.dtype == terms.dtype(bound)
    assert np.array_equal(read, values)
    dense = len(terms.to_bytes(values, values.size, bound))
    assert sum(map(len, parts)) <= dense
    assert len(parts) == 2 or len(parts[0]) == dense


def leb128(gap: int) -> bytes:
    """Return a number as the format's specification has it (DWARF 4, section 7.6)."""
    out = bytearray()
    while True:
        out.append(gap & 0x7F | (0x80 if gap > 0x7F else 0))
        gap >>= 7
        if not gap:
            return bytes(out)


@given(st.sets(st.integers(0, 2**34), min_size=1, max_size=20))
def test_gaps_are_leb128(places: set[int]) -> None:
    ordered = sorted(places)
    gaps = [ordered[0], *(b - a - 1 for a, b in itertools.pairwise(ordered))]
    wanted = b"".join(map(leb128, gaps))
    assert sparse._gaps(np.array(ordered)) == wanted
    read = sparse._from_gaps(np.frombuffer(wanted, np.uint8), 2**34 + 1)
    assert read.tolist() == ordered


@pytest.mark.parametrize(
    ("every", "kind", "size"),
    [
        # 10,000 values of two bytes: one in a hundred by gaps, one in five by bitmap.
        (100, sparse.GAPS, 1 + 100 + 200),
        (5, sparse.BITMAP, 1 + 1250 + 4000),
        (5000, sparse.GAPS, 1 + 3 + 4),
    ],
)
def test_the_shorter_way_is_taken(every: int, kind: bytes, size: int) -> None:
    values = np.zeros(10_000, np.int64)
    values[::every] = 300
    parts = sparse.to_parts(values, values.size, 32_767)
    assert parts[0][:1] == kind
    assert sum(map(len, parts)) == size


def test_nothing_but_zeros_is_a_byte() -> None:
    parts = sparse.to_parts(np.zeros(500, np.int64), 500, 100)
    assert [bytes(part) for part in parts] == [sparse.GAPS, b""]
    assert not sparse.view(parts, 500, 100).any()


ONE = b"\x05"
"""The value 5, at a bound of 100."""


@pytest.mark.parametrize(
    ("positions", "told", "says"),
    [
        (b"", ONE, "neither"),
        (b"\2\0", ONE, "neither"),
        (sparse.GAPS + b"\x64", ONE, "behind the term"),  # position 100 of 100
        (sparse.GAPS + b"\x63\x00", ONE * 2, "behind the term"),  # 99 and 100
        (sparse.GAPS + b"\x80", ONE, "cut short"),
        (sparse.GAPS + b"\x85\x00", ONE, "longer ones"),
        (sparse.GAPS + b"\x80" * 5 + b"\x01", ONE, "longer ones"),
        (sparse.GAPS + b"\xff" * 4 + b"\x7f", ONE, "longer ones"),
        (sparse.GAPS + bytes(101), ONE * 101, "more gaps"),
        (sparse.GAPS + b"\0\0", ONE, "instead of 2"),
        (sparse.GAPS + b"\0", ONE * 2, "instead of 1"),
        (sparse.GAPS + b"\0", b"\0", "a zero among"),
        (sparse.GAPS, ONE, "instead of 0"),
        (sparse.BITMAP + bytes(12), b"", "bitmap of 12 bytes"),
        (sparse.BITMAP + bytes(14), b"", "bitmap of 14 bytes"),
        (sparse.BITMAP + bytes(12) + b"\x10", ONE, "behind the term"),
        (sparse.BITMAP + b"\3" + bytes(12), ONE, "instead of 2"),
    ],
)
def test_positions_and_values_that_are_no_term_are_refused(
    positions: bytes, told: bytes, says: str
) -> None:
    with pytest.raises(Refused, match=says):
        sparse.view([positions, told], 100, 100)


def test_a_gap_longer_than_it_need_be_is_refused_in_a_long_term_too() -> None:
    with pytest.raises(Refused, match="longer than it need be"):
        sparse.view([sparse.GAPS + b"\x85\x00", ONE], 1000, 100)


def test_a_hostile_message_costs_little_more_than_its_own_bytes() -> None:
    """Positions of gaps that a term has no room for are refused before arrays are made of them."""
    positions = sparse.GAPS + b"\x80\x80\x80\x80\x01" * 200_000
    most = process.apart(peaks.of_refusal, positions, ONE, 1_000_000)
    assert most < 5 * len(positions)


def test_a_term_has_one_or_two_parts() -> None:
    for parts in ([], [b"", b"", b""]):
        with pytest.raises(Refused, match="parts"):
            sparse.view(parts, 100, 100)


@given(
    st.one_of(
        st.binary(max_size=40),
        st.builds(bytes.__add__, st.sampled_from([sparse.GAPS, sparse.BITMAP]), st.binary()),
    ),
    st.binary(max_size=40),
    st.integers(1, 200),
)
@settings(max_examples=500)
def test_whatever_is_sent_is_refused_or_a_term_in_its_only_form(
    positions: bytes, told: bytes, length: int
) -> None:
    try:
        values = sparse.view([positions, told], length, 127)
    except Refused:
        return
    assert values.shape == (length,)
    places = np.flatnonzero(values)
    bitmap = np.packbits(values != 0, bitorder="little").tobytes()
    gaps = sparse._gaps(places)
    assert positions in (sparse.GAPS + gaps, sparse.BITMAP + bitmap)
    assert told == values[places].astype("i1").tobytes()


def test_a_sparse_value_outside_the_bound_is_refused_and_nothing_of_it_stays():
    cohort = Cohort("plain")
    spec = cohort.spec(length=1000, bound=100)
    given_terms = {name: np.arange(1000) % 7 for name in cohort.names}
    hub, ask = cohort.until(CONTRIBUTE, spec, given_terms)
    wide = np.zeros(1000, np.int64)
    wide[[5, 700]] = 3, 101
    for name in cohort.names:
        term = wide if name == NAMES[0] else given_terms[name]
        asked = replace(spec, bound=127)
        reply = cohort.parties[name].answer(asked, CONTRIBUTE, ask.payloads[name], term)
        if name == NAMES[0]:
            with pytest.raises(Refused, match="outside"):
                hub.receive(name, reply)
        else:
            hub.receive(name, reply)
    others = len(cohort.names) - 1
    assert hub.advance().values.tolist() == (others * (np.arange(1000) % 7)).tolist()


@pytest.mark.parametrize("term", [None, np.zeros(9, np.int64), np.zeros(10, np.int32)])
def test_what_is_no_term_is_not_written(term: np.ndarray | None) -> None:
    with pytest.raises(Refused):
        sparse.to_parts(term, 10, 100)


def test_sparse_terms_add_up_with_dense_ones() -> None:
    cohort = Cohort("plain")
    spec = cohort.spec(length=1000, bound=127)
    given_terms = {name: np.zeros(1000, np.int64) for name in cohort.names}
    given_terms[NAMES[0]][[3, 999]] = 5, -7
    given_terms[NAMES[1]][:] = np.arange(1000) % 100 + 1
    _, ask = cohort.until(CONTRIBUTE, spec, given_terms)
    sizes = []
    for name in cohort.names:
        reply = cohort.parties[name].answer(spec, CONTRIBUTE, ask.payloads[name], given_terms[name])
        sizes.append(sum(map(len, frames.unpack(reply).parts)))
    assert sizes[:2] == [1 + 1 + 2 + 2, 1000]
    total = Cohort("plain").sum(spec, given_terms)
    assert total.values.tolist() == sum(given_terms.values()).tolist()
