"""A plan's rule: what is refused before anything starts, and rounds in which devices lie."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from blobs import Blobs
from cohorts import Fleet, fleet, plan_of, varied

from atoll.federation import parameters, plan, rounds, training
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.plan import Aggregation
from atoll.federation.rule import RULES, Rule, needed
from atoll.federation.run import RoundReport
from atoll.privacy.errors import BadParameters
from atoll.privacy.sums import CONTRIBUTE, Integers, PartySum, SumSpec

HEAD = 'name = "p"\ntask = "t"\nmodel = "m"\n'
DEVICES, LIARS = 7, 1


def text_of(
    aggregation: str, privacy: str = 'mode = "plain"', training: str = "", least: int = 11
) -> str:
    return (
        f"{HEAD}cohort = {{ min_devices = {least} }}\naggregation = {{ {aggregation} }}\n"
        f"privacy = {{ {privacy} }}\ntraining = {{ {training} }}\n"
    )


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
def test_a_rule_is_read_from_a_plan_that_has_devices_enough(rule: Rule) -> None:
    asked = f'rule = "{rule}", byzantine = 2'
    least = needed(rule, 2)
    assert plan.loads(text_of(asked, least=least)).aggregation == Aggregation(rule, 2)
    with pytest.raises(BadPlan, match=rf"needs {least} updates or more: raise cohort.min_devices"):
        plan.loads(text_of(asked, least=least - 1))


def test_a_plan_that_names_no_rule_takes_the_mean() -> None:
    assert plan.loads(HEAD).aggregation == Aggregation("mean", 0, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (text_of('rule = "krum", byzantine = 2', 'mode = "secagg"'), "the hub sees none"),
        (text_of('rule = "median", byzantine = 2', 'mode = "he"'), "the hub sees none"),
        (text_of('rule = "krum", byzantine = 2', ""), 'privacy.mode = "secagg" the hub sees none'),
        (
            text_of('rule = "median", byzantine = 2', 'mode = "plain", noise_multiplier = 1.0'),
            "calibrated for a mean",
        ),
        (
            text_of(
                'rule = "median", byzantine = 2',
                'mode = "plain", noise_multiplier = 1.0, noise = "central"',
            ),
            "calibrated for a mean",
        ),
        (
            text_of('rule = "bulyan", byzantine = 2', 'mode = "plain", clip = "adaptive"'),
            'leave privacy.clip = "adaptive" out',
        ),
        (
            text_of(
                'rule = "krum", byzantine = 2', training='weighting = "capped", weight_cap = 9'
            ),
            'leave training.weighting = "capped" out',
        ),
        (text_of('rule = "krum", byzantine = 2', training="step_cap = 9"), "training.step_cap out"),
        (text_of('rule = "krum"'), "has to know how many"),
        (text_of('rule = "mean", byzantine = 1'), "withstands no lying device"),
        (text_of('rule = "geometric"'), "geometric"),
        (text_of('rule = "krum", byzantine = -1'), "byzantine"),
        (text_of('rule = "krum", byzantine = 1, trim = 0.2'), "aggregation.trim belongs to"),
        (text_of('rule = "trimmed-mean", byzantine = 1, trim = 0.5'), "trim"),
        (text_of('rule = "trimmed-mean", byzantine = 3, trim = 0.2'), "raise aggregation.trim"),
    ],
)
def test_what_a_rule_does_not_go_with_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        plan.loads(text)


def test_noise_on_examples_goes_with_any_rule() -> None:
    examples = "{ noise_multiplier = 1.0, clip_norm = 1.0, sampling_rate = 0.1, steps = 5 }"
    text = text_of('rule = "krum", byzantine = 1', f'mode = "plain", examples = {examples}')
    assert plan.loads(text).privacy.examples is not None


def robust_plan(rule: Rule, count: int = 4, trim: float | None = None) -> plan.Plan:
    byzantine = 0 if rule == "mean" else LIARS
    return varied(
        plan_of(count=count, least=DEVICES),
        aggregation={"rule": rule, "byzantine": byzantine, "trim": trim},
    )


@dataclass
class Loud:
    """Sends its update backwards and as large as the sum lets through."""

    party: PartySum

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        if phase == CONTRIBUTE and term is not None:
            term = np.where(term > 0, -spec.bound, spec.bound)
        return self.party.answer(spec, phase, payload, term)


def attacked(folder: Path) -> Fleet:
    return fleet(
        folder,
        DEVICES,
        sums=lambda name, party: Loud(party) if name == "device-1" else party,
    )


def accuracy(weights: np.ndarray, folder: Path) -> float:
    """On the test examples of an honest device."""
    done = training.evaluate(Blobs().model(0), weights, Blobs().load(folder / "device-2", "test"))
    return done.correct / done.rows


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum", "bulyan"])
def test_a_loud_liar_destroys_the_mean_and_not_what_withstands_it(
    tmp_path: Path, rule: Rule
) -> None:
    destroyed = attacked(tmp_path).run(robust_plan("mean"), run="mean")
    withstood = attacked(tmp_path).run(robust_plan(rule), run="robust")
    assert accuracy(destroyed.weights, tmp_path) < 0.7
    assert accuracy(withstood.weights, tmp_path) > 0.9
    assert (withstood.ended, withstood.rounds) == ("complete", 4)


def test_a_norm_bound_takes_the_loudness_from_a_liar(tmp_path: Path) -> None:
    start = parameters.flatten(Blobs().model(7))
    moved = {
        rule: np.linalg.norm(
            attacked(tmp_path).run(robust_plan(rule, count=1), run=rule).weights - start
        )
        for rule in ("mean", "norm-bound")
    }
    assert moved["norm-bound"] <= 2.0  # the clipping norm
    assert moved["mean"] > 2.0


@dataclass
class Noted:
    """An honest device whose terms are written down."""

    party: PartySum
    terms: list[Integers]

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        if term is not None:
            self.terms.append(term)
        return self.party.answer(spec, phase, payload, term)


@pytest.mark.parametrize(("trim", "cut"), [(None, 1), (0.45, 3)])
def test_a_round_steps_by_what_the_rule_makes_of_the_decoded_updates(
    tmp_path: Path, trim: float | None, cut: int
) -> None:
    terms: list[Integers] = []
    here = fleet(tmp_path, DEVICES, sums=lambda _, party: Noted(party, terms))
    asked = robust_plan("trimmed-mean", count=1, trim=trim)
    reports: list[RoundReport] = []
    done = here.run(asked, on_round=reports.append)
    unit = 2.0 / (2**15 - 1)  # the clipping norm over the largest integer of 16 bits
    kept = np.sort(np.array(terms), axis=0)[cut : DEVICES - cut] * unit
    step = done.weights - parameters.flatten(Blobs().model(7))
    np.testing.assert_allclose(step, kept.mean(axis=0), atol=1e-6)
    assert len(reports[0].survivors) == DEVICES
    assert reports[0].clip_norm == 2.0
    assert reports[0].epsilon is None


def test_a_round_with_fewer_than_the_rule_needs_is_thrown_away(tmp_path: Path) -> None:
    here = fleet(tmp_path, DEVICES)
    here.grid.disconnect(3)
    with pytest.raises(RoundFailed, match="the plan needs 7"):
        here.run(robust_plan("bulyan"))


def test_a_session_that_keeps_no_terms_is_refused(tmp_path: Path) -> None:
    here = fleet(tmp_path, DEVICES)
    asked = robust_plan("krum")

    class Summing:
        def open(self, *_: object) -> None:
            raise AssertionError("a sum was opened")

    with pytest.raises(BadParameters, match="looks at every update"):
        rounds.run_rounds(
            replace(here.of(asked), session=Summing()), parameters.flatten(Blobs().model(7))
        )
