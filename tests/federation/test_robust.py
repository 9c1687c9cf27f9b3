"""Each rule against cases done by hand, a slow oracle, and devices that lie without limit."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atoll.federation import robust
from atoll.federation.rule import RULES, Rule, needed
from atoll.privacy.errors import BadParameters, BadUpdate

ROBUST = [rule for rule in RULES if rule != "mean"]
LOUDEST = 1e200
"""Its square is no float any more."""


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True))


def slow_scores(rows: list[np.ndarray], f: int) -> list[float]:
    scores = []
    for i, mine in enumerate(rows):
        others = sorted(apart(mine, other) for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[: max(len(rows) - f - 2, 1)]))
    return scores


def slow(updates: np.ndarray, rule: Rule, f: int) -> np.ndarray:
    """The rules as their papers write them, a value at a time."""
    n, d = updates.shape
    rows = [updates[i].astype(float) for i in range(n)]
    columns = [sorted(float(row[j]) for row in rows) for j in range(d)]
    if rule == "mean":
        return np.array([math.fsum(column) / n for column in columns])
    if rule == "median":
        return np.array([(column[(n - 1) // 2] + column[n // 2]) / 2 for column in columns])
    if rule == "trimmed-mean":
        return np.array([math.fsum(column[f : n - f]) / (n - 2 * f) for column in columns])
    if rule in ("krum", "multi-krum"):
        scores = slow_scores(rows, f)
        order = sorted(range(n), key=lambda i: (scores[i], i))
        best = order[: 1 if rule == "krum" else n - f - 2]
        return np.mean([rows[i] for i in best], axis=0)
    if rule == "bulyan":
        left, picked = list(rows), []
        while len(picked) < n - 2 * f:
            scores = slow_scores(left, f) if len(left) > 1 else [0.0]
            picked.append(left.pop(scores.index(min(scores))))
        made = []
        for j in range(d):
            values = sorted(float(row[j]) for row in picked)
            middle = float(np.median(values))
            nearest = sorted(values, key=lambda value: abs(value - middle))
            made.append(math.fsum(nearest[: n - 4 * f]) / (n - 4 * f))
        return np.array(made)
    norms = [math.sqrt(math.fsum(value**2 for value in row.tolist())) for row in rows]
    limit = float(np.median(norms))
    return np.mean(
        [row * min(1, limit / (norm or 1)) for row, norm in zip(rows, norms, strict=True)], axis=0
    )


@st.composite
def cases(draw: st.DrawFn, rules: list[Rule] = ROBUST) -> tuple[Rule, int, np.ndarray]:
    """A rule, how many liars it is told of, and honest updates, enough of them."""
    rule, f = draw(st.sampled_from(rules)), draw(st.integers(1, 3))
    n = needed(rule, f) + draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    centre = rng.normal(size=7) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    return rule, f, centre + rng.normal(size=(n, 7))


LIES: list[Callable[[np.ndarray, np.random.Generator], np.ndarray]] = [
    lambda honest, rng: rng.normal(size=7) * LOUDEST,
    lambda honest, rng: np.full(7, LOUDEST),
    lambda honest, rng: -honest.mean(axis=0) * 10,
    lambda honest, rng: honest.mean(axis=0) + 1.5 * honest.std(axis=0),
    lambda honest, rng: honest[0] + np.eye(7)[0] * 1e6,
    lambda honest, rng: honest[0],
]


@st.composite
def attacked(
    draw: st.DrawFn, rules: list[Rule] = ROBUST
) -> tuple[Rule, int, np.ndarray, np.ndarray]:
    """A case whose last rows lie, each in a way of its own or all alike, and in any place."""
    rule, f, updates = draw(cases(rules))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lie = draw(st.sampled_from(LIES))
    honest, updates = updates[f:], updates.copy()
    same = draw(st.booleans())
    for row in range(f):
        updates[row] = updates[0] if same and row else lie(honest, rng)
    return rule, f, honest, updates[rng.permutation(len(updates))]


def test_every_rule_has_a_name_and_knows_how_many_it_needs() -> None:
    assert get_args(Rule) == RULES
    assert {rule: needed(rule, 2) for rule in RULES} == {
        "mean": 1,
        "median": 5,
        "trimmed-mean": 5,
        "krum": 7,
        "multi-krum": 7,
        "bulyan": 11,
        "norm-bound": 5,
    }


@pytest.mark.parametrize("rule", ["trimmed-mean", "krum", "multi-krum", "bulyan"])
@pytest.mark.parametrize("f", [1, 2, 5])
def test_fewer_updates_than_a_rule_needs_are_refused(rule: Rule, f: int) -> None:
    enough = needed(rule, f)
    assert robust.combine(np.ones((enough, 2)), rule, f).tolist() == pytest.approx([1, 1])
    with pytest.raises(BadParameters, match=f"needs {enough} updates"):
        robust.combine(np.ones((enough - 1, 2)), rule, f)
    with pytest.raises(BadParameters, match="-1 lying devices"):
        robust.combine(np.ones((enough, 2)), rule, -1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "updates",
    [np.ones(3), np.ones((0, 3)), np.ones((9, 0)), np.full((9, 2), np.nan), [[np.inf]] * 9],
    ids=["one axis", "no rows", "no values", "NaN", "Inf"],
)
def test_what_is_no_matrix_of_numbers_is_refused(rule: Rule, updates: object) -> None:
    with pytest.raises(BadUpdate):
        robust.combine(np.asarray(updates), rule, 1)


def test_by_hand() -> None:
    # Four devices near (1, 1), one liar; distances from 0 to 4 are read off.
    updates = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 2.0], [100.0, -50.0]])
    assert robust.median(updates).tolist() == [1.0, 0.0]
    assert robust.trimmed_mean(updates, 1) == pytest.approx([2 / 3, 2 / 3])
    # Two nearest others: 1 + 4 for each of the four, so that the first wins.
    assert robust.krum(updates, 1).tolist() == [0.0, 0.0]
    # The two best: the first two, for all four score alike.
    assert robust.multi_krum(updates, 1).tolist() == [0.5, 0.0]
    # Norms 0, 1, 2, √5, √12500: the median is 2.
    long, wide = 2 / math.sqrt(5), 2 / math.sqrt(12500)
    assert robust.norm_bound(updates) == pytest.approx(
        [(1 + long + 100 * wide) / 5, (2 + 2 * long - 50 * wide) / 5]
    )
    assert robust.norm_bound(updates, 1.0)[0] == pytest.approx((1 + long / 2 + 50 * wide) / 5)


def test_krum_takes_the_one_in_the_middle() -> None:
    updates = np.array([[-1.0], [0.1], [1.0], [2.5], [-9.0]])
    # Sums of the two least squares: 1.21+4, 0.81+1.21, 0.81+2.25, 2.25+5.76, 64+...
    assert robust.krum(updates, 1).tolist() == [0.1]


def test_bulyan_by_hand() -> None:
    # Seven devices, one liar: Krum picks five, and the three nearest to their median count.
    updates = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [1000.0]])
    assert robust.bulyan(updates, 1).tolist() == slow(updates, "bulyan", 1).tolist()
    assert 1.0 <= robust.bulyan(updates, 1)[0] <= 4.0
    # A liar that is honest but for one coordinate passes Krum, and is cut there.
    twin = np.array([[0.0, i / 10] for i in range(6)] + [[0.4, 0.25]])
    assert robust.bulyan(twin, 1)[0] == 0.0


@given(cases(list(RULES)))
def test_every_rule_equals_its_slow_oracle(case: tuple[Rule, int, np.ndarray]) -> None:
    rule, f, updates = case
    got = robust.combine(updates, rule, f)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, slow(updates, rule, f), rtol=1e-9, atol=1e-9)


@given(cases(list(RULES)), st.integers(0, 2**32))
def test_the_order_of_devices_does_not_matter(
    case: tuple[Rule, int, np.ndarray], seed: int
) -> None:
    rule, f, updates = case
    shuffled = np.random.default_rng(seed).permutation(updates)
    one, other = robust.combine(updates, rule, f), robust.combine(shuffled, rule, f)
    if rule in ("krum", "multi-krum", "bulyan"):
        # Among equals the first wins. Bulyan ends with 2f + 1 rows to pick from: up to f = 2 only
        # one distance counts there, and two that are each other's nearest are equals.
        scores = sorted(slow_scores(list(updates), f))
        assume(min(np.diff(scores)) > 1e-9 and not (rule == "bulyan" and f <= 2))
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_blocks_and_narrow_types_change_nothing(
    rule: Rule, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = np.random.default_rng(1).normal(size=(15, 101)) * 1000
    narrow = updates.astype(dtype)
    whole = robust.combine(narrow.astype(np.float64), rule, 3)
    monkeypatch.setattr(robust, "BLOCK_VALUES", 50)
    np.testing.assert_allclose(robust.combine(narrow, rule, 3), whole, rtol=1e-12, atol=1e-12)


@given(cases())
def test_when_nobody_lies_the_result_is_near_the_mean(
    case: tuple[Rule, int, np.ndarray],
) -> None:
    rule, f, updates = case
    mean = updates.mean(axis=0)
    if rule == "norm-bound":
        # What it cuts off is all that it changes.
        norms = np.linalg.norm(updates, axis=1)
        most = np.maximum(norms - np.median(norms), 0).mean()
    else:
        most = np.linalg.norm(updates - mean, axis=1).max()
    assert np.linalg.norm(robust.combine(updates, rule, f) - mean) <= most + 1e-9


@given(cases(list(RULES)), st.floats(0.01, 100))
def test_rules_scale_with_what_they_are_given(
    case: tuple[Rule, int, np.ndarray], factor: float
) -> None:
    rule, f, updates = case
    one = robust.combine(updates * 2.0 ** round(factor), rule, f)
    np.testing.assert_allclose(one, robust.combine(updates, rule, f) * 2.0 ** round(factor))


@given(attacked(["median", "trimmed-mean"]))
def test_liars_move_no_coordinate_out_of_the_honest_range(case: tuple) -> None:
    rule, f, honest, updates = case
    got = robust.combine(updates, rule, f)
    slack = 1e-12 * np.abs(honest).max()
    assert (got >= honest.min(axis=0) - slack).all()
    assert (got <= honest.max(axis=0) + slack).all()


@given(attacked(["bulyan"]))
def test_bulyan_stays_within_the_honest_range_widened_by_itself(case: tuple) -> None:
    rule, f, honest, updates = case
    low, high = honest.min(axis=0), honest.max(axis=0)
    got = robust.combine(updates, rule, f)
    assert (got >= low - (high - low)).all()
    assert (got <= high + (high - low)).all()


@given(attacked(["krum", "multi-krum"]))
def test_krum_stays_as_near_to_the_honest_as_they_are_to_each_other(case: tuple) -> None:
    rule, f, honest, updates = case
    n = len(updates)
    width = max(math.sqrt(apart(a, b)) for a in honest for b in honest)
    reach = width * math.sqrt((n - f - 2) / (n - 2 * f - 1))
    got = robust.combine(updates, rule, f)
    # Each row that counts has an honest one within reach, and that lies within the honest range.
    assert (got >= honest.min(axis=0) - reach - 1e-9).all()
    assert (got <= honest.max(axis=0) + reach + 1e-9).all()
    if rule == "krum":
        assert any((got == row).all() for row in updates)
        assert min(math.sqrt(apart(got, row)) for row in honest) <= reach + 1e-9


@given(attacked(["norm-bound"]))
def test_a_norm_bound_limits_what_liars_do(case: tuple) -> None:
    _, f, honest, updates = case
    longest = np.linalg.norm(honest, axis=1).max()
    got = robust.norm_bound(updates)
    assert np.linalg.norm(got) <= longest + 1e-9
    limit = float(np.median(robust._norms(updates)))
    clipped = sum(row * min(1, limit / np.linalg.norm(row)) for row in honest) / len(updates)
    assert np.linalg.norm(got - clipped) <= f * limit / len(updates) + 1e-9


@pytest.mark.parametrize(
    ("rule", "honest", "lying"),
    [
        ("median", 2, 3),
        ("trimmed-mean", 6, 3),
        ("krum", 3, 4),
        ("multi-krum", 3, 4),
        ("bulyan", 5, 6),
    ],
)
def test_rules_told_of_two_liars_break_where_more_agree(
    rule: Rule, honest: int, lying: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(honest, 3))
    far = np.full((lying, 3), 1e6) + np.random.default_rng(1).normal(size=(lying, 3)) * 1e-3
    assert np.abs(robust.combine(np.concatenate([rows, far]), rule, 2)).max() > 1e5
    told = np.concatenate([rows, np.zeros((lying - 2, 3)), far[:2]])
    assert np.abs(robust.combine(told, rule, 2)).max() < 10


def test_the_mean_is_moved_anywhere_by_one() -> None:
    honest = np.zeros((9, 3))
    liar = np.full((1, 3), 1e9)
    assert robust.mean(np.concatenate([honest, liar])).tolist() == pytest.approx([1e8] * 3)


@pytest.mark.parametrize(("trim", "cut"), [(None, 2), (0.1, 1), (0.29, 2), (0.3, 3), (0.49, 4)])
def test_a_share_is_cut_off_at_either_end(trim: float | None, cut: int) -> None:
    assert robust.cut_of(10, 2, trim) == cut
    updates = np.arange(10.0)[:, None] ** 3
    got = robust.combine(updates, "trimmed-mean", 2, trim)
    assert got[0] == pytest.approx((np.arange(10.0) ** 3)[cut : 10 - cut].mean())


def test_hundredths_are_cut_as_written() -> None:
    assert [robust.cut_of(100, 0, share / 100) for share in range(1, 50)] == list(range(1, 50))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(BadParameters, match="bound"):
        robust.norm_bound(np.ones((3, 2)), bound)


ALONE = """
import time
import numpy as np
from atoll.federation import robust
from atoll.privacy import update

updates = np.random.default_rng(0).integers(-9, 9, (20, 400_000)).astype(np.int16)
works = [
    lambda: robust._weighed(updates, np.full(20, 0.05)),
    lambda: robust.fltrust(updates, updates[0]),
    lambda: [update.norm(row) for row in updates],
]
for work in works:
    mine, all_threads = time.thread_time(), time.process_time()
    work()
    mine, all_threads = time.thread_time() - mine, time.process_time() - all_threads
    print(mine, all_threads)
"""


def test_products_with_a_vector_start_no_threads() -> None:
    """Other threads' CPU time is that of BLAS: it would be as much again as this one's."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        mine, all_threads = map(float, line.split())
        assert all_threads < 1.1 * mine + 0.005


def test_fltrust_by_hand() -> None:
    trusted = np.array([2.0, 0.0])
    # Alike; at 60°; at a right angle; against; nothing at all.
    updates = np.array([[5.0, 0.0], [0.5, 0.75**0.5], [0.0, 9.0], [-4.0, 1.0], [0.0, 0.0]])
    # Weights 1 and 1/2, each row brought to length 2.
    expected = (np.array([2.0, 0.0]) + 0.5 * np.array([1.0, 3**0.5])) / 1.5
    assert robust.fltrust(updates, trusted) == pytest.approx(expected)
    assert robust.fltrust(updates[2:], trusted).tolist() == [0.0, 0.0]


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_fltrust_is_no_longer_than_what_is_trusted_whoever_lies(seed: int, liars: int) -> None:
    rng = np.random.default_rng(seed)
    trusted = rng.normal(size=6)
    updates = np.concatenate(
        [trusted + rng.normal(size=(2, 6)), 1e100 * rng.normal(size=(liars, 6))]
    )
    got = robust.fltrust(updates, trusted)
    assert np.linalg.norm(got) <= np.linalg.norm(trusted) * (1 + 1e-9)
    assert got @ trusted >= 0


@pytest.mark.parametrize("trusted", [[0.0, 0.0], [1.0], [[1.0, 1.0]], [math.nan, 1.0]])
def test_an_update_that_points_nowhere_is_not_trusted(trusted: object) -> None:
    with pytest.raises(BadParameters, match="trusted"):
        robust.fltrust(np.ones((3, 2)), np.asarray(trusted))
