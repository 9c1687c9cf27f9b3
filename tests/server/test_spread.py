"""Accuracy by cohort: closed forms, and that no small cohort can be read or worked out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.federation.messages import EvaluateReply
from atoll.server import measures, model_card, small_groups, spread
from atoll.server.questions import Tally

TALLIES = {
    "a": Tally(10, 10),
    "b": Tally(8, 10),
    "c": Tally(45, 90),
    "d": Tally(0, 0),
    "e": Tally(6, 10),
}
SIDES = {"known": ["a", "b", "c", "d"], "unseen": ["e"]}


def test_every_device_weighs_the_same_in_the_spread_and_every_example_in_the_whole() -> None:
    found = spread.over_devices(TALLIES, ["a", "b", "c", "d"])
    assert found["devices"] == 3  # one has no examples
    assert found["rows"] == 110
    assert found["accuracy"] == pytest.approx(63 / 110)
    assert found["mean"] == pytest.approx(2.3 / 3)
    assert found["std"] == pytest.approx(math.sqrt((1 + 0.64 + 0.25) / 3 - (2.3 / 3) ** 2))
    assert (found["worst"], found["worst_tenth"], found["best"]) == (0.5, 0.5, 1.0)


@given(st.integers(1, 60))
def test_the_worst_tenth_is_the_mean_of_the_tenth_of_devices_that_fare_worst(count) -> None:
    tallies = {f"device-{n}": Tally(n, 100) for n in range(count)}
    tenth = -(-count // 10)
    found = spread.over_devices(tallies, list(tallies)[::-1])
    assert found["worst_tenth"] == pytest.approx((tenth - 1) / 2 / 100)


def test_a_side_of_few_devices_is_left_out_and_the_reason_said() -> None:
    found = spread.by_cohort(TALLIES, SIDES, {}, 2)
    assert set(found["spread"]) == {"all", "known"}
    assert found["spread_left_out"] == {"unseen": "1 device, fewer than cohort.min_devices = 2"}
    assert "| known | 3 |" in "\n".join(model_card._spread(found))


def test_labels_make_cohorts() -> None:
    labels = {"a": {"site": "x"}, "b": {"site": "x"}, "c": {"site": "y"}, "e": {"site": "y"}}
    found = spread.by_cohort(TALLIES, SIDES, labels, 2)
    assert found["spread"]["site=x"]["mean"] == pytest.approx(0.9)
    assert found["spread"]["site=y"]["accuracy"] == pytest.approx(51 / 100)
    assert "site" not in found["spread_left_out"]


def test_a_cohort_that_would_give_a_small_one_away_is_left_out_with_it() -> None:
    labels = {"a": {"site": "x"}, "b": {"site": "x"}, "c": {"site": "x"}, "e": {"site": "y"}}
    found = spread.by_cohort(TALLIES, SIDES, labels, 2)
    assert not {"site=x", "site=y"} & set(found["spread"])
    assert "2 of 2 values" in found["spread_left_out"]["site"]
    assert "y" not in found["spread_left_out"]["site"].split()  # nor is it named


def test_nor_do_devices_without_the_label_count_as_a_crowd() -> None:
    labels = {"a": {"site": "x"}, "b": {"site": "x"}, "c": {"site": "x"}}  # e has none
    assert "site=x" not in spread.by_cohort(TALLIES, SIDES, labels, 2)["spread"]


members = st.dictionaries(
    st.sampled_from("pqrstuv"), st.sets(st.integers(0, 30), max_size=12), max_size=7
)


@given(members, st.integers(1, 6))
def test_what_is_shown_is_never_small_and_neither_is_what_is_not(groups, least) -> None:
    kept = small_groups.shown(groups, least)
    assert all(len(groups[name]) >= least for name in kept)
    rest = set().union(*(who for name, who in groups.items() if name not in kept))
    assert not kept or not rest or len(rest) >= least
    if all(len(who) >= least for who in groups.values()):
        assert kept == list(groups)


def test_the_order_in_which_devices_answered_changes_no_bit_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    replies = {
        f"device-{one}": EvaluateReply(rows=int(rng.integers(1, 99)), correct=0, loss=rng.random())
        for one in range(50)
    }
    orders = [list(replies), sorted(replies), list(reversed(replies))]
    told = [
        measures.of_weights({name: replies[name] for name in order}, {"known": order})["loss"]
        for order in orders
    ]
    assert told[0] == told[1] == told[2]
