"""The pipeline over in-process devices: real ClientApps, real queries, real sums."""

import math
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from waves import Fleet, Waves, plan_of

from atoll.edge_agent.onnx import Onnx  # after the path
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.plan import Aggregation, Asynchrony
from atoll.fleet import bundle as bundles
from atoll.fleet import profile as profiles
from atoll.fleet import queries
from atoll.privacy import accounting
from atoll.privacy.ledger import Gaussian, Ledger, MemoryStore, Unnoised
from atoll.server import pipeline
from atoll.server.charging import event_of, example_event
from atoll.server.recording import MemoryRecorder
from atoll.server.web_runs import STAGES


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    recorder = MemoryRecorder()
    return fleet, fleet.run(plan_of(noise=0.01), recorder), recorder


def test_a_run_ends_with_a_bundle_that_a_device_would_accept(done):
    fleet, result, _ = done
    assert result.manifest is not None, result.refused
    directory = fleet.root / "candidate"
    assert bundles.read(directory) == result.manifest
    golden = bundles.read_golden(directory)
    runtime = Onnx((directory / bundles.MODEL).read_bytes())
    got = runtime.run({"input": golden.inputs})["logits"]
    bundles.golden_check(golden.expected, got, golden.tolerance)


def test_the_golden_check_refuses_a_broken_runtime(done):
    fleet, _, _ = done
    golden = bundles.read_golden(fleet.root / "candidate")
    runtime = Onnx((fleet.root / "candidate" / bundles.MODEL).read_bytes())
    turned = runtime.run({"input": golden.inputs[:, ::-1].copy()})["logits"]
    with pytest.raises(bundles.BadBundle):
        bundles.golden_check(golden.expected, turned, golden.tolerance)


def test_stages_come_in_the_order_that_the_dashboard_shows(done):
    assert tuple(done[2].stages) == STAGES


def test_known_and_unseen_devices_are_told_apart(done):
    fleet, result, _ = done
    facts = result.facts
    assert set(facts["accuracy"]) == {"known", "unseen", "all"}
    assert facts["rows"] == {"known": 360, "unseen": 120, "all": 480}
    assert facts["accuracy"]["known"]["float"] > 0.9
    assert set(facts["by_device"]) == set(fleet.cohort.evaluators)
    assert np.sum(facts["confusion"]["known"]) == 360


def test_accuracies_are_those_of_the_devices_own_examples(done):
    fleet, result, _ = done
    runtime = Onnx((fleet.root / "candidate" / bundles.MODEL).read_bytes())
    held = [Waves().load(fleet.root / name, "test") for name in fleet.cohort.trainers]
    right = sum(
        int((runtime.run({"input": one.x})["logits"].argmax(1) == one.y).sum()) for one in held
    )
    assert result.facts["accuracy"]["known"]["int8"] == pytest.approx(right / 360)


def test_the_profile_counts_the_trainers_held_back_examples(done):
    fleet, result, _ = done
    data = (fleet.root / "candidate" / bundles.PROFILE).read_bytes()
    profile = profiles.Profile.decode(data)
    assert profile.rows == 360
    assert profile.features.names == ("a:mean", "a:std", "b:mean", "b:std")
    assert all(int(counts.sum()) == 360 for counts in profile.reference().values())
    classes = profile.reference()[profiles.OUTPUT_CLASS][:3]
    predicted = np.sum(result.facts["confusion"]["known"], axis=0)
    np.testing.assert_array_equal(classes, predicted)


def test_each_round_is_charged_and_reported(done):
    _, result, recorder = done
    assert [report.round for report in recorder.rounds] == [1, 2, 3, 4]
    epsilons = [report.epsilon for report in recorder.rounds]
    assert epsilons == sorted(epsilons)
    assert result.facts["epsilon"] == epsilons[-1]


def test_facts_can_be_stored_as_json(done):
    facts = done[2].facts
    assert msgspec.json.decode(msgspec.json.encode(facts)).keys() == facts.keys()
    assert all(math.isfinite(value) for value in done[1].manifest.metrics.values())


def test_the_card_says_what_was_measured(done):
    text = (done[0].root / "candidate" / bundles.CARD).read_text()
    assert "| known |" in text
    assert "| unseen |" in text
    assert "ε = " in text


def test_without_noise_there_is_no_epsilon(tmp_path):
    result = Fleet(tmp_path, unseen=0).run(plan_of())
    assert result.manifest is not None, result.refused
    assert result.facts["epsilon"] is None
    assert set(result.facts["accuracy"]) == {"known", "all"}
    assert "no ε" in (tmp_path / "candidate" / bundles.CARD).read_text()


def test_a_robust_rule_carries_a_run_and_the_card_names_it(tmp_path):
    plan = msgspec.structs.replace(plan_of(least=3), aggregation=Aggregation("median", 1))
    result = Fleet(tmp_path).run(plan)
    assert result.manifest is not None, result.refused
    assert result.facts["epsilon"] is None
    text = (tmp_path / "candidate" / bundles.CARD).read_text()
    assert "combined by `median` against 1 lying device a round" in text


def test_encrypted_sums_carry_a_run_as_well(tmp_path):
    result = Fleet(tmp_path, count=3).run(plan_of(mode="he", rounds=3))
    assert result.manifest is not None, result.refused


def test_a_model_no_better_than_chance_is_rejected_and_leaves_no_candidate(tmp_path):
    fleet = Fleet(tmp_path)
    plan = plan_of(rounds=1)
    lazy = msgspec.structs.replace(
        plan, training=msgspec.structs.replace(plan.training, server_learning_rate=1e-9)
    )
    result = fleet.run(lazy)
    assert result.manifest is None
    assert "better than chance" in result.refused
    assert not (tmp_path / "candidate").exists()


def test_a_budget_stops_the_rounds_and_what_was_trained_goes_on(tmp_path):
    store = MemoryStore()
    plan = plan_of(rounds=6, noise=1.0, more=", budget_epsilon = 8.0")
    result = Fleet(tmp_path).run(plan, store=store)
    assert result.facts["rounds"]["ended"] == "budget"
    assert 0 < result.facts["rounds"]["trained"] < 6
    assert result.facts["privacy"]["epsilon"] <= 8.0
    assert len(store.events("waves")) == result.facts["rounds"]["trained"]


def test_a_round_is_charged_as_one_gaussian_riders_included():
    assert event_of(plan_of(), 8) == Unnoised()
    assert event_of(plan_of(noise=0.8), 8) == Gaussian(0.8)
    riding = varied(
        plan_of(noise=0.8),
        training={"weighting": "capped", "weight_cap": 10},
        privacy={"clip": "adaptive"},
    )
    event = event_of(riding, 8)
    assert event.sampling is None
    assert event.noise_multiplier == pytest.approx((1 / 0.64 + 2 / 16) ** -0.5)


def test_a_run_says_where_its_clipping_norm_went(tmp_path):
    store = MemoryStore()
    plan = varied(
        plan_of(rounds=2, noise=0.01),
        training={"weighting": "capped", "weight_cap": 100},
        privacy={"clip": "adaptive"},
    )
    recorder = MemoryRecorder()
    result = Fleet(tmp_path).run(plan, recorder, store=store)
    norms = [report.clip_norm for report in recorder.rounds]
    assert norms[0] == plan.privacy.clip_norm != norms[1]
    assert result.facts["privacy"]["clip_norm"] == norms[1]
    charged = [event["noise_multiplier"] for _, event in store.events("waves")]
    assert charged == pytest.approx([0.01 / math.sqrt(1 + 2 / 25)] * 2)


def test_sampling_is_charged_where_it_amplifies_alone():
    central = varied(
        plan_of(noise=0.8),
        cohort={"sampling_rate": 0.1, "min_devices": 30},
        privacy={"noise": "central"},
    )
    assert event_of(central, 1000) == Gaussian(0.8, 0.1)
    assert event_of(central, 400) == Gaussian(0.8)
    assert event_of(central, 600) == Gaussian(0.8)  # of 1000, the others being away
    shared = varied(central, privacy={"noise": "distributed"})
    assert event_of(shared, 1000) == Gaussian(0.8)


def varied(plan, **sections):
    """Return the plan with fields of its sections replaced."""
    return msgspec.structs.replace(
        plan,
        **{
            name: msgspec.structs.replace(getattr(plan, name), **fields)
            for name, fields in sections.items()
        },
    )


EXAMPLES = (
    ", examples = {{ noise_multiplier = {noise}, clip_norm = 1.0, sampling_rate = 0.15, "
    "steps = 40, budget_epsilon = 3.0 }}"
)


def examples_account(store, budget=None):
    return Ledger(store, "waves", budget, 1e-5, unit="example")


def test_each_round_is_charged_to_the_examples_before_it_starts(tmp_path):
    store = MemoryStore()
    plan = plan_of(rounds=2, more=EXAMPLES.format(noise=0.3), noise=0.01)
    result = Fleet(tmp_path).run(plan, store=store, examples=examples_account(store))
    assert result.manifest is not None, result.refused
    assert [charge for charge, _ in store.events("waves")] == [
        *("run1/1/examples", "run1/1"),
        *("run1/2/examples", "run1/2"),
    ]
    event = Gaussian(0.3, 0.15, times=40)
    spent = accounting.spent([event, event], 1e-5).epsilon_pld
    assert result.facts["privacy"]["examples"]["epsilon"] == pytest.approx(spent, rel=1e-9)
    assert result.facts["privacy"]["epsilon"] > 10 * spent  # the devices' own account


def test_the_noise_that_a_plan_asks_for_reaches_the_devices_training(tmp_path):
    plan = plan_of(rounds=1, more=EXAMPLES.format(noise=64))
    result = Fleet(tmp_path).run(plan, examples=examples_account(MemoryStore()))
    assert "better than chance" in result.refused


def test_the_ledger_of_examples_stops_the_rounds_as_the_devices_does(tmp_path):
    store, event = MemoryStore(), Gaussian(0.3, 0.15, times=40)
    budget = accounting.spent([event], 1e-5).epsilon_pld * 1.01
    plan = plan_of(more=EXAMPLES.format(noise=0.3))
    result = Fleet(tmp_path).run(plan, store=store, examples=examples_account(store, budget))
    assert (result.facts["rounds"]["ended"], result.facts["rounds"]["trained"]) == ("budget", 1)


def test_examples_are_not_trained_on_without_a_ledger_of_theirs(tmp_path):
    plan = plan_of(more=EXAMPLES.format(noise=1))
    with pytest.raises(BadPlan, match="ledger of examples"):
        Fleet(tmp_path).run(plan)
    assert example_event(plan_of()) is None


def _lies(name, **changes):
    """Return a handler that answers with numbers that do not fit together."""

    def answer(_data):
        kind = queries.ANSWERS[name][1]
        return queries.encode(kind(**changes))

    return {name: answer}


def test_a_plan_with_a_buffer_runs_without_rounds(tmp_path):
    store, recorder = MemoryStore(), MemoryRecorder()
    plan = plan_of(noise=0.01)
    central = msgspec.structs.replace(plan.privacy, noise="central")
    plan = msgspec.structs.replace(plan, privacy=central, asynchrony=Asynchrony(2, 3))
    result = Fleet(tmp_path).run(plan, recorder, store)
    assert result.facts["rounds"]["trained"] == 4
    assert [len(report.survivors) for report in recorder.rounds] == [2, 2, 2, 2]
    assert [name for name, _ in store.events("waves")] == [f"run1/{n}" for n in (1, 2, 3, 4)]
    assert result.facts["accuracy"]["known"]["float"] > 0.9


ODD = [
    _lies(queries.EVALUATE_ONNX, confusion=[[10**9, 0], [0, 0]], rows=10**9),
    _lies(queries.EVALUATE_ONNX, confusion=[[-1, 1, 0], [0, 0, 0], [0, 0, 0]], rows=0),
    _lies(queries.ACTIVATION_RANGES, tensors={}, rows=1),
    _lies(queries.FEATURE_COUNTS, counts={"a:mean": b"\x01"}, rows=5),
    _lies(queries.PROFILE_COUNTS, counts={}, rows=0),
    {queries.FEATURE_RANGES: lambda _: b"\xc1"},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: next(iter(odd)))
def test_two_devices_with_odd_answers_are_left_out(tmp_path, odd):
    result = Fleet(tmp_path, count=5, unseen=0, altered=odd).run(plan_of(rounds=2))
    assert result.facts["devices"]["evaluated"] >= 3
    assert result.facts["rows"]["known"] <= 5 * 120
    assert result.facts["profile"]["rows"] in {360, 600}


@pytest.mark.parametrize("odd", ODD[2:], ids=lambda odd: next(iter(odd)))
def test_too_few_sound_answers_end_the_run(tmp_path, odd):
    fleet = Fleet(tmp_path, count=3, unseen=0, altered=odd)
    with pytest.raises(RoundFailed, match="answered the question"):
        fleet.run(plan_of(rounds=1))


def test_signals_are_watched_by_moments_and_tables_by_columns():
    assert pipeline.features_of(Waves()).kind == "channel-stats"

    class Table(Waves):
        input_shape = (2,)

    class Image(Waves):
        input_shape = (2, 8, 8)

    assert pipeline.features_of(Table()).kind == "columns"
    assert pipeline.features_of(Image()).kind == "channel-stats"
