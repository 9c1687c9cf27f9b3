"""Cohorts and groups through the pipeline: real ClientApps, real queries, one model card."""

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from waves import Fleet, Waves, plan_of

from atoll.edge_agent.onnx import Onnx  # after the path
from atoll.federation.errors import BadGroups, BadPlan
from atoll.federation.task import NO_GROUP, groups_of
from atoll.fleet import bundle as bundles
from atoll.fleet import queries
from atoll.server import fairness, policy
from atoll.server.recording import MemoryRecorder


class Tagged(Waves):
    """Every third example is of nobody known, the others are of two groups by turns."""

    groups = ("first", "second")

    def group_of(self, data, split):
        return np.arange(len(self.load(data, split).y)) % 3 - 1


class Wrong(Tagged):
    def group_of(self, data, split):
        return np.full(len(self.load(data, split).y), 2)


LABELS = {f"device-{n}": {"site": "north" if n <= 2 else "south"} for n in range(1, 5)}


def gated(limit):
    plan = plan_of(noise=0.01)
    return msgspec.structs.replace(
        plan, gates={"fair to both": f"fairness.equalised_odds <= {limit}"}
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), task=Tagged(), labels=LABELS)
    recorder = MemoryRecorder()
    return fleet, fleet.run(gated(1.0), recorder), recorder


def shipped(fleet):
    return Onnx((fleet.root / "candidate" / bundles.MODEL).read_bytes())


def test_fairness_is_that_of_the_shipped_model_on_the_examples_of_all_devices(done) -> None:
    fleet, result, _ = done
    counts = np.zeros((2, 3, 3), np.int64)
    for name in fleet.cohort.evaluators:
        data = fleet.root / name
        held, group = Tagged().load(data, "test"), Tagged().group_of(data, "test")
        predicted = shipped(fleet).run({"input": held.x})["logits"].argmax(axis=1)
        for where, truth, guess in zip(group, held.y, predicted, strict=True):
            if where != NO_GROUP:
                counts[where, truth, guess] += 1
    found = result.facts["fairness"]
    assert found["equalised_odds"] == pytest.approx(fairness.judge(counts).equalised_odds.max())
    assert found["groups"]["first"]["rows"] == counts[0].sum() == 160
    assert found["devices"] == 4
    assert result.manifest is not None, result.refused
    assert result.manifest.metrics["fairness.equalised_odds"] == found["equalised_odds"]


def test_accuracy_is_told_by_side_and_label_with_its_spread(done) -> None:
    _, result, _ = done
    found, by_device = result.facts["spread"], result.facts["by_device"]
    assert set(found) == {"all", "known", "site=north", "site=south"}
    north = [by_device[name]["int8"] for name in ("device-1", "device-2")]
    assert found["site=north"]["mean"] == pytest.approx(np.mean(north))
    assert found["site=north"]["std"] == pytest.approx(np.std(north))
    assert found["site=north"]["worst"] == min(north)
    assert "unseen" in result.facts["spread_left_out"]


def test_gates_may_be_about_every_fact_of_a_run(done) -> None:
    assert done[2].facts.keys() - {"gates"} <= policy.FACTS
    written = {
        "every class": "fairness.compared == model.classes",
        "north": 'spread["site=north"].accuracy >= 0.0 && spread.known.worst_tenth >= 0.0',
        "by class": "fairness.by_class.slow.equal_opportunity <= 1.0",
    }
    rules = [policy.Rule(name, rule) for name, rule in written.items()]
    for rule in rules:
        policy.check(rule)
    assert policy.passed(policy.judge(done[1].facts, rules)), policy.judge(done[1].facts, rules)


def test_the_card_tells_of_both_and_no_single_device_is_in_the_bundle(done) -> None:
    fleet, result, recorder = done
    card = (fleet.root / "candidate" / bundles.CARD).read_text()
    assert "| site=north | 2 |" in card
    assert "| equalised odds, difference |" in card
    assert "fair to both: passed, by `fairness.equalised_odds <= 1.0`" in card
    assert not any("device-" in name for name in result.manifest.metrics)
    assert msgspec.json.decode(msgspec.json.encode(recorder.facts))["fairness"]


def test_a_plans_gate_on_fairness_refuses_the_candidate(tmp_path) -> None:
    result = Fleet(tmp_path, task=Tagged()).run(gated(-1.0))
    assert result.manifest is None
    assert "fair to both (fairness.equalised_odds = " in result.refused


def test_such_a_gate_is_refused_before_anything_starts_where_nobody_tells_of_groups(
    tmp_path,
) -> None:
    recorder = MemoryRecorder()
    with pytest.raises(BadPlan, match="tells of none"):
        Fleet(tmp_path).run(gated(1.0), recorder)
    assert recorder.stages == []


def test_devices_whose_counts_are_no_parts_of_the_whole_are_left_out_of_the_groups(
    tmp_path,
) -> None:
    def boasts(_data):
        return queries.encode(
            queries.Evaluated(
                confusion=[[5, 0, 0], [0, 5, 0], [0, 0, 5]],
                rows=15,
                by_group=[[[9, 0, 0], [0, 0, 0], [0, 0, 0]], [[0] * 3] * 3],
            )
        )

    fleet = Fleet(tmp_path, task=Tagged(), altered={queries.EVALUATE_ONNX: boasts})
    found = fleet.run(plan_of(rounds=2)).facts
    assert found["devices"]["evaluated"] == 4
    assert found["fairness"]["devices"] == 2


def test_groups_that_fit_no_example_are_refused_on_the_device(tmp_path) -> None:
    data = Fleet(tmp_path, count=2, unseen=0).root / "device-1"
    with pytest.raises(BadGroups, match="below 2"):
        groups_of(Wrong(), data, "test", 120)
    with pytest.raises(BadGroups, match="one whole number"):
        groups_of(Tagged(), data, "test", 119)
    assert groups_of(Waves(), data, "test", 120) is None
