"""Group fairness: hand-computed cases, the definitions taken literally, and what is not shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll.server import fairness
from atoll.server.policy import Rule, judge

# Two groups, two classes; [group][true][predicted].
HAND = np.array([[[8, 2], [3, 7]], [[4, 6], [1, 9]]])


def test_two_groups_and_two_classes_give_what_a_hand_computes() -> None:
    found = fairness.judge(HAND)
    # Told "1": 9 of 20 and 15 of 20; told "0": the rest.
    assert found.demographic_parity == pytest.approx([0.3, 0.3])
    assert found.demographic_parity_ratio == pytest.approx([5 / 11, 9 / 15])
    # "1" when true: 0.7 and 0.9, when not: 0.2 and 0.6. "0" when true: 0.8, 0.4; not: 0.3, 0.1.
    assert found.equal_opportunity == pytest.approx([0.4, 0.2])
    assert found.equalised_odds == pytest.approx([0.4, 0.4])


def literally(counts):
    """Fairlearn 0.13's documented formulas over single examples, one class against the rest.

    demographic_parity_difference: the largest less the smallest selection rate of any group.
    equalized_odds_difference: the larger of true_positive_rate_difference and
    false_positive_rate_difference.
    """
    group, true, predicted = (
        np.repeat(index, counts.ravel()) for index in np.indices(counts.shape).reshape(3, -1)
    )
    groups, classes, _ = counts.shape

    def rate(chosen, of):
        return np.mean(chosen[of]) if of.any() else np.nan

    parity, quotient, odds = [], [], []
    for c in range(classes):
        told = predicted == c
        chosen = [rate(told, group == g) for g in range(groups)]
        right = [rate(told, (group == g) & (true == c)) for g in range(groups)]
        wrong = [rate(told, (group == g) & (true != c)) for g in range(groups)]
        parity.append(max(chosen) - min(chosen) if not np.isnan(chosen).any() else np.nan)
        known = not np.isnan(chosen).any() and max(chosen) > 0
        quotient.append(min(chosen) / max(chosen) if known else np.nan)
        gaps = [
            max(rates) - min(rates) if not np.isnan(rates).any() else np.nan
            for rates in (right, wrong)
        ]
        odds.append(max(gaps) if not np.isnan(gaps).any() else np.nan)
    return parity, quotient, odds


tables = hnp.arrays(
    np.int64,
    st.tuples(st.integers(1, 3), st.integers(2, 4)).map(lambda s: (s[0], s[1], s[1])),
    elements=st.integers(0, 5),
)


@given(tables)
def test_counts_give_what_the_definitions_give_over_single_examples(counts) -> None:
    found = fairness.judge(counts)
    parity, quotient, odds = literally(counts)
    np.testing.assert_allclose(found.demographic_parity, parity, atol=1e-12)
    np.testing.assert_allclose(found.demographic_parity_ratio, quotient, atol=1e-12)
    np.testing.assert_allclose(found.equalised_odds, odds, atol=1e-12)


@given(tables)
def test_a_model_that_is_always_right_has_equal_odds_whatever_the_groups_hold(counts) -> None:
    perfect = np.zeros_like(counts)
    for g in range(len(counts)):
        np.fill_diagonal(perfect[g], counts[g].sum(axis=1))
    known = fairness.judge(perfect).equalised_odds
    assert not np.nan_to_num(known).any()


@given(tables)
def test_the_order_of_groups_does_not_matter(counts) -> None:
    for one, other in zip(fairness.judge(counts), fairness.judge(counts[::-1]), strict=True):
        np.testing.assert_array_equal(one, other)


def devices(*tables):
    return {f"device-{n}": np.array(table) for n, table in enumerate(tables)}


@given(st.integers(2, 5), st.randoms(use_true_random=False))
def test_what_is_told_depends_on_the_sum_over_devices_alone(count, random) -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    parts = rng.multinomial(1, np.full(count, 1 / count), size=HAND.sum())
    places = np.repeat(np.indices(HAND.shape).reshape(3, -1), HAND.ravel(), axis=1)
    dealt = np.zeros((count, *HAND.shape), np.int64)
    np.add.at(dealt, (parts.argmax(axis=1), *places), 1)
    answers = {f"device-{n}": part for n, part in enumerate(dealt)}
    found = fairness.of_devices(answers, ("a", "b"), ("0", "1"), 1)
    assert found["equalised_odds"] == pytest.approx(0.4)
    assert found["equalised_odds_mean"] == pytest.approx(0.4)
    assert found["demographic_parity"] == pytest.approx(0.3)
    assert found["demographic_parity_ratio"] == pytest.approx(5 / 11)
    assert found["accuracy_difference"] == pytest.approx(0.1)
    assert {name: by["rows"] for name, by in found["groups"].items()} == {"a": 20, "b": 20}
    assert found["by_class"]["1"]["equal_opportunity"] == pytest.approx(0.2)


NOBODY = np.zeros((2, 2), int)


def test_a_group_on_fewer_devices_than_the_plan_needs_is_neither_shown_nor_compared() -> None:
    answers = devices(HAND, [HAND[0], NOBODY], [HAND[0], NOBODY])
    found = fairness.of_devices(answers, ("a", "b"), ("0", "1"), 2)
    assert found["groups"] == {}  # with a's counts b's could be worked out
    assert set(found["left_out"]) == {"a", "b"}
    assert "on 1 of 3 devices" in found["left_out"]["b"]
    assert "equalised_odds" not in found
    [verdict] = judge({"fairness": found}, [Rule("fair", "fairness.equalised_odds <= 1.0")])
    assert not verdict.passed


def test_a_group_that_nobody_holds_is_said_to_be_empty_and_hides_no_other() -> None:
    three = np.concatenate([HAND, NOBODY[None]])
    found = fairness.of_devices(devices(three, three), ("a", "b", "c"), ("0", "1"), 2)
    assert found["left_out"] == {"c": "no examples"}
    assert found["equalised_odds"] == pytest.approx(0.4)


def test_a_class_that_a_group_has_no_example_of_is_not_compared_and_counted_so() -> None:
    counts = np.array([[[5, 1, 0], [0, 4, 0], [0, 0, 2]], [[6, 0, 0], [2, 2, 0], [0, 0, 0]]])
    found = fairness.of_devices(devices(counts, counts), ("a", "b"), ("x", "y", "z"), 2)
    assert found["compared"] == 2
    assert "equalised_odds" not in found["by_class"]["z"]
    assert found["by_class"]["y"]["equal_opportunity"] == pytest.approx(0.5)
    assert found["equal_opportunity"] == pytest.approx(0.5)
    strict = Rule("fair in every class", "fairness.compared == model.classes")
    assert not judge({"fairness": found, "model": {"classes": 3}}, [strict])[0].passed


def test_without_an_answer_there_are_no_measures() -> None:
    found = fairness.of_devices({}, ("a", "b"), ("0", "1"), 2)
    assert found["groups"] == {}
    assert "equalised_odds" not in found
