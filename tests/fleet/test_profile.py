from functools import reduce

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.fleet import profile as profiles
from atoll.fleet.errors import BadProfile
from atoll.fleet.profile import (
    OUTPUT_CLASS,
    OUTPUT_SCORE,
    Categorical,
    Features,
    FeatureSpec,
    Numeric,
    Profile,
    build,
    count,
    feature_range,
    features,
    fine_counts,
    merge,
    quantile_edges,
    synthesise,
)

SPEC = FeatureSpec(kind="channel-stats", channels=("x", "y"))
CLASSES = ("a", "b", "c")


def _signals(rng, n):
    means = np.array([0.0, 5.0])[:, None]
    return (rng.normal(size=(n, 2, 40)) + rng.normal(size=(n, 2, 1)) + means).astype(np.float32)


def _profile(seed=0, n=2000):
    rng = np.random.default_rng(seed)
    found = features(SPEC, _signals(rng, n))
    ranges = feature_range(found)
    profile = build(SPEC, quantile_edges(fine_counts(found, ranges), ranges), CLASSES)
    probabilities = rng.dirichlet([1, 1, 1], n)
    return profile.with_counts(count(profile, found, probabilities), n)


PROFILE = _profile()


def test_a_profile_holds_features_and_outputs_in_at_most_64_bins() -> None:
    assert set(PROFILE.variables) == {*SPEC.names, OUTPUT_CLASS, OUTPUT_SCORE}
    assert all(len(PROFILE.variables[name].edges) == 63 for name in SPEC.names)
    assert PROFILE.bins[OUTPUT_SCORE] == 21
    assert PROFILE.classes == CLASSES
    reference = PROFILE.reference()
    assert all(counts.sum() == PROFILE.rows for counts in reference.values())
    assert reference["x:mean"][:-1].min() > 0


def test_a_profile_survives_its_file() -> None:
    assert Profile.decode(PROFILE.encode()) == PROFILE


@settings(max_examples=300)
@given(st.data())
def test_damaged_bytes_are_a_profile_or_refused(data) -> None:
    encoded = bytearray(PROFILE.encode())
    for _ in range(3):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] = data.draw(st.integers(0, 255))
    try:
        Profile.decode(bytes(encoded))
    except BadProfile:
        return


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 40))
def test_any_grouping_of_rows_counts_the_same(seed, parts, n) -> None:
    rng = np.random.default_rng(seed)
    x, probabilities = _signals(rng, n), rng.dirichlet([1, 1, 1], n)
    cuts = [
        count(PROFILE, features(SPEC, share), probability)
        for share, probability in zip(
            np.array_split(x, parts), np.array_split(probabilities, parts), strict=True
        )
    ]
    whole = count(PROFILE, features(SPEC, x), probabilities)
    merged = reduce(merge, cuts)
    for name, counts in whole.items():
        np.testing.assert_array_equal(merged[name], counts)
        assert counts.sum() == n
        assert counts.size == PROFILE.bins[name]


def test_a_value_on_an_edge_falls_into_the_upper_bin() -> None:
    variable = Numeric((0.0, 1.0), (0, 0, 0, 0))
    values = np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(variable.index(values), [0, 1, 1, 2, 2, 3, 3, 3])


def test_what_is_no_category_is_counted_apart() -> None:
    variable = Categorical(("a", "b"), (0, 0, 0))
    values = np.array([0, 1, 2, -1, 0.5, np.nan, np.inf])
    np.testing.assert_array_equal(variable.index(values), [0, 1, 2, 2, 2, 2, 2])


def test_nan_and_infinity_are_counted_as_missing_in_inputs_and_outputs() -> None:
    x = _signals(np.random.default_rng(1), 4)
    x[0, 0, 0], x[1, 0, 3] = np.nan, np.inf
    probabilities = np.array([[1, 0, 0], [0.2, 0.3, 0.5], [np.nan, 1, 0], [0, 1, 0]])
    counts = count(PROFILE, features(SPEC, x), probabilities)
    assert counts["x:mean"][-1] == counts["x:std"][-1] == 2
    assert counts["y:mean"][-1] == 0
    np.testing.assert_array_equal(counts[OUTPUT_CLASS], [1, 1, 1, 1])
    assert counts[OUTPUT_SCORE][-1] == 1
    assert counts[OUTPUT_SCORE][10] == 1  # 0.5 to 0.55
    assert counts[OUTPUT_SCORE][19] == 2  # the certain ones


def test_probabilities_of_another_shape_are_refused() -> None:
    found = features(SPEC, _signals(np.random.default_rng(1), 4))
    with pytest.raises(BadProfile, match="probabilities"):
        count(PROFILE, found, np.zeros((4, 2)))
    with pytest.raises(BadProfile, match="probabilities"):
        count(PROFILE, found, np.zeros((3, 3)))
    with pytest.raises(BadProfile, match="no feature"):
        count(PROFILE, Features(found.values[:, :1], ("z",)), np.zeros((4, 3)))


def test_a_feature_without_any_finite_value_still_has_bins() -> None:
    profile = build(SPEC, {}, CLASSES)
    assert profile.bins["x:mean"] == 3


def test_categories_of_a_table_are_bins() -> None:
    spec = FeatureSpec(kind="columns", channels=("age", "sex"), categories={"sex": ("f", "m")})
    profile = build(spec, {"age": (30.0, 60.0)}, CLASSES)
    x = np.array([[20, 0], [40, 1], [70, 7], [np.nan, 1]], np.float32)
    counts = count(profile, features(spec, x), np.full((4, 3), 1 / 3))
    np.testing.assert_array_equal(counts["sex"], [1, 2, 1])
    np.testing.assert_array_equal(counts["age"], [1, 1, 1, 1])
    drawn = synthesise(profile.with_counts(counts, 4), (2,), 50, np.random.default_rng(0))
    assert set(drawn[:, 1].tolist()) <= {0.0, 1.0}
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Numeric((), (0, 0)),
        lambda: Numeric((1.0, 1.0), (0, 0, 0, 0)),
        lambda: Numeric((float("nan"),), (0, 0, 0)),
        lambda: Numeric((1.0,), (0, 0)),
        lambda: Numeric((1.0,), (0, 0, -1)),
        lambda: Numeric(tuple(map(float, range(64))), (0,) * 66),
        lambda: Categorical((), (0,)),
        lambda: PROFILE.with_counts({}, 0),
        lambda: PROFILE.with_counts(PROFILE.reference(), -1),
        lambda: Profile(features=SPEC, variables={}),
        lambda: msgspec.structs.replace(
            PROFILE,
            variables={**PROFILE.variables, OUTPUT_CLASS: PROFILE.variables[OUTPUT_SCORE]},
        ),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(make) -> None:
    with pytest.raises(BadProfile):
        make()


def test_synthetic_examples_fall_into_the_bins_as_the_reference_does() -> None:
    x = synthesise(PROFILE, (2, 40), 4000, np.random.default_rng(2))
    assert x.dtype == np.float32
    assert x.shape == (4000, 2, 40)
    counts = count(PROFILE, features(SPEC, x), np.full((4000, 3), 1 / 3))
    for name in SPEC.names:
        ours, theirs = counts[name] / 4000, PROFILE.reference()[name] / PROFILE.rows
        assert np.abs(np.cumsum(ours) - np.cumsum(theirs)).max() < 0.04


@given(st.integers(0, 2**32 - 1))
def test_synthetic_examples_are_finite_and_replayable(seed) -> None:
    one, two = (synthesise(PROFILE, (2, 7), 3, np.random.default_rng(seed)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.isfinite(one).all()


def test_synthetic_examples_need_no_counts_and_no_time() -> None:
    empty = build(SPEC, {"x:mean": (0.0, 1.0)}, CLASSES)
    assert synthesise(empty, (2, 1), 5, np.random.default_rng(0)).shape == (5, 2, 1)
    only = FeatureSpec(kind="channel-stats", channels=("x",), stats=("mean",))
    drawn = synthesise(
        build(only, {"x:mean": (2.0,)}, CLASSES), (1, 500), 2, np.random.default_rng(0)
    )
    np.testing.assert_allclose(drawn.std(axis=2), 1, rtol=1e-3)


def test_synthetic_images_have_the_moments_that_were_drawn_for_their_channels() -> None:
    flat = synthesise(PROFILE, (2, 30), 5, np.random.default_rng(2))
    images = synthesise(PROFILE, (2, 5, 6), 5, np.random.default_rng(2))
    assert images.shape == (5, 2, 5, 6)
    assert images.tobytes() == flat.tobytes()


def test_synthetic_examples_of_another_shape_are_refused() -> None:
    for shape in ((3, 40), (2,), (2, 0)):
        with pytest.raises(BadProfile, match="do not fit"):
            synthesise(PROFILE, shape, 1, np.random.default_rng(0))


def test_every_exported_name_is_there() -> None:
    assert all(hasattr(profiles, name) for name in profiles.__all__)
