import math

import pytest

from atoll.server import policy
from atoll.server.policy import Rule, judge


def _facts(**changes):
    facts = {
        "rounds": {"trained": 20},
        "devices": {"asked": 10, "evaluated": 10},
        "accuracy": {
            "known": {"float": 0.98, "int8": 0.975},
            "all": {"float": 0.95, "int8": 0.946},
        },
        "model": {"classes": 7, "export_changed": 0.0},
        "golden": {"worst": 0.1, "tolerance": 0.2, "spread": 6.0},
        "privacy": {"epsilon": 900.0, "delta": 1e-5},
    }
    return facts | changes


def _failed(facts):
    return [verdict.name for verdict in judge(facts) if not verdict.passed]


def test_a_sound_candidate_passes_every_rule():
    assert policy.passed(judge(_facts()))


@pytest.mark.parametrize("int8", [0.9699, 0.9901])
def test_int8_that_moved_a_point_either_way_is_refused(int8):
    good, moved = {"float": 0.98, "int8": 0.98}, {"float": 0.98, "int8": int8}
    assert _failed(_facts(accuracy={"known": good, "all": moved})) == ["int8 within one point"]
    assert _failed(_facts(accuracy={"known": moved, "all": good})) == [
        "int8 within one point, known people"
    ]


def test_an_accuracy_without_its_int8_is_refused():
    facts = _facts(accuracy={"known": {"float": 0.98, "int8": 0.98}, "all": {"float": 0.8}})
    assert _failed(facts) == ["int8 within one point"]


def test_a_missing_fact_refuses_and_says_so():
    facts = _facts()
    del facts["golden"]
    verdicts = {verdict.name: verdict for verdict in judge(facts)}
    assert not verdicts["golden check holds"].passed
    assert "cannot be evaluated" in verdicts["golden check holds"].detail


def test_no_facts_at_all_refuse_everything():
    assert not any(verdict.passed for verdict in judge({}))


def test_a_budget_that_was_set_and_exceeded_is_refused():
    assert _failed(_facts(privacy={"epsilon": 9.0, "budget": 8.0})) == ["privacy budget"]
    assert not _failed(_facts(privacy={"epsilon": 7.0, "budget": 8.0}))


def test_a_budget_without_a_known_epsilon_is_refused():
    assert _failed(_facts(privacy={"budget": 8.0})) == ["privacy budget"]


def test_nan_passes_no_rule():
    good, odd = {"float": 0.98, "int8": 0.98}, {"float": math.nan, "int8": 0.98}
    facts = _facts(accuracy={"known": good, "all": odd})
    assert _failed(facts) == ["int8 within one point"]


@pytest.mark.parametrize(
    "expression", ["1.0", "'true'", "missing", "1.0 <", "", "1.0 + 'a' == 2.0"]
)
def test_only_true_is_true(expression):
    assert not judge({}, [Rule("odd", expression)])[0].passed


def test_no_rules_are_no_permission():
    assert not policy.passed([])


def test_whole_numbers_among_the_facts_compare_with_doubles():
    assert judge({"n": {"a": 3}}, [Rule("three", "n.a == 3.0")])[0].passed


def test_a_verdict_names_the_numbers_that_its_rule_names():
    [verdict] = judge({"n": {"a": 3, "b": 4}}, [Rule("less", "n.a < 2.0")])
    assert verdict.detail == "n.a = 3"
    assert verdict.plain()["passed"] is False
