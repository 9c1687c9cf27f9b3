from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.fleet.errors import BadProfile
from atoll.fleet.features import (
    Features,
    FeatureSpec,
    Ranges,
    feature_range,
    features,
    fine_counts,
    quantile_edges,
)

SIGNALS = FeatureSpec(kind="channel-stats", channels=("x", "y"))
TABLE = FeatureSpec(kind="columns", channels=("age", "sex"), categories={"sex": ("female", "male")})
any_float = st.floats(width=32)


def _spans(low, high):
    return st.dictionaries(
        st.sampled_from("abc"),
        st.tuples(st.floats(low, 0), st.floats(0, high)),
    ).map(Ranges)


@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(0, 5), st.just(2), st.integers(1, 9)), elements=any_float
    )
)
def test_channel_stats_are_mean_and_standard_deviation(x) -> None:
    values, names = features(SIGNALS, x)
    assert names == ("x:mean", "x:std", "y:mean", "y:std")
    assert values.dtype == np.float64
    assert values.shape == (len(x), 4)
    finite = np.isfinite(x).all(axis=2)
    wide = x.astype(np.float64)
    for channel in range(2):
        rows = finite[:, channel]
        np.testing.assert_allclose(values[rows, 2 * channel], wide[rows, channel].mean(axis=1))
        np.testing.assert_allclose(values[rows, 2 * channel + 1], wide[rows, channel].std(axis=1))
        assert not np.isfinite(values[~rows, 2 * channel + 1]).any()


def test_columns_are_the_columns() -> None:
    x = np.array([[30, 1], [40, 0]], np.float32)
    found = features(TABLE, x)
    np.testing.assert_array_equal(found.column("sex"), [1, 0])
    assert TABLE.numeric == ("age",)
    with pytest.raises(BadProfile, match="no feature"):
        found.column("height")


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(SIGNALS, (3, 1, 5)), (SIGNALS, (3, 2)), (SIGNALS, (3, 2, 0)), (TABLE, (3, 2, 5))],
)
def test_examples_of_another_shape_are_refused(spec, shape) -> None:
    with pytest.raises(BadProfile, match="do not fit"):
        features(spec, np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "fields",
    [
        {"channels": ()},
        {"channels": ("a", "a")},
        {"channels": ("output:class",)},
        {"channels": ("a",), "categories": {"b": ("x",)}},
        {"channels": ("a",), "categories": {"a": ()}},
    ],
)
def test_an_ambiguous_specification_is_refused(fields) -> None:
    with pytest.raises(BadProfile):
        FeatureSpec(kind="columns", **fields)


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(0, 20), st.just(3)),
        elements=st.floats(-1e300, 1e300) | st.just(np.nan) | st.just(np.inf),
    )
)
def test_ranges_hold_every_finite_value_and_are_not_much_wider(values) -> None:
    ranges = feature_range(Features(values, ("a", "b", "c")))
    for name, column in zip("abc", values.T, strict=True):
        finite = column[np.isfinite(column)]
        assert (name in ranges.spans) == bool(finite.size)
        if finite.size:
            low, high = ranges.spans[name]
            assert low <= finite.min() <= finite.max() <= high
            width = finite.max() - finite.min()
            assert high - low <= width * 1.26


def test_a_range_does_not_give_the_extreme_example_away() -> None:
    values = np.random.default_rng(0).normal(size=(100, 1))
    low, high = feature_range(Features(values, ("a",))).spans["a"]
    assert low < values.min()
    assert high > values.max()


@given(_spans(-1e6, 1e6), _spans(-1e6, 1e6), _spans(-1e6, 1e6))
def test_merging_ranges_is_associative_commutative_and_idempotent(a, b, c) -> None:
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a


@pytest.mark.parametrize(
    "span", [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf")), (-1.7e308, 1.7e308)]
)
def test_an_unusable_range_is_refused(span) -> None:
    with pytest.raises(BadProfile, match="no usable range"):
        Ranges({"a": span})


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_fine_counts_merge_to_those_of_all_rows(seed, parts) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(60, 2))
    values[rng.random(values.shape) < 0.1] = np.nan
    names = ("a", "b")
    shares = [Features(part, names) for part in np.array_split(values, parts)]
    ranges = Ranges({})
    for share in shares:
        ranges = ranges.merge(feature_range(share))
    total = sum(fine_counts(share, ranges, 50)["a"] for share in shares)
    whole = fine_counts(Features(values, names), ranges, 50)
    np.testing.assert_array_equal(total, whole["a"])
    assert whole["a"].sum() == len(values)
    assert whole["a"][-1] == np.isnan(values[:, 0]).sum()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "uniform", "lumpy", "far"]))
def test_quantile_edges_split_rows_evenly_to_within_a_fine_bin(seed, kind) -> None:
    rng = np.random.default_rng(seed)
    column = {
        "normal": rng.normal(size=4000),
        "uniform": rng.uniform(size=4000),
        "lumpy": np.concatenate([rng.normal(size=2000), rng.normal(8, 0.2, 2000)]),
        "far": rng.normal(1e6, 1, 4000),
    }[kind]
    found = Features(column[:, None], ("a",))
    ranges = feature_range(found)
    fine = fine_counts(found, ranges)
    edges = quantile_edges(fine, ranges, 16)["a"]
    assert all(low < high for low, high in pairwise(edges))
    held = np.histogram(column, [-np.inf, *edges, np.inf])[0]
    assert len(edges) == 15
    assert abs(held - 250).max() <= 2 * fine["a"][:-1].max()


def test_a_feature_that_never_varies_gets_one_edge() -> None:
    found = Features(np.full((10, 1), 3.0), ("a",))
    ranges = feature_range(found)
    assert quantile_edges(fine_counts(found, ranges), ranges) == {"a": (3.0,)}


def test_an_empty_stretch_gets_no_edges() -> None:
    fine = {"a": np.array([50, 0, 0, 0, 0, 0, 0, 0, 0, 50, 0], np.int64)}
    edges = np.array(quantile_edges(fine, Ranges({"a": (0.0, 10.0)}), 8)["a"])
    assert ((edges <= 1) | (edges >= 9)).all()


def test_ranges_and_counts_of_different_features_do_not_go_together() -> None:
    with pytest.raises(BadProfile, match="different features"):
        quantile_edges({}, Ranges({"a": (0.0, 1.0)}))


def test_an_image_is_watched_by_the_moments_of_its_channels() -> None:
    x = np.random.default_rng(3).normal(size=(4, 2, 5, 6)).astype(np.float32)
    values, names = features(SIGNALS, x)
    assert names == ("x:mean", "x:std", "y:mean", "y:std")
    np.testing.assert_allclose(values[:, 2], x[:, 1].astype(np.float64).mean(axis=(1, 2)))
    np.testing.assert_allclose(values[:, 3], x[:, 1].astype(np.float64).std(axis=(1, 2)))
