"""From a plan to a candidate: train, evaluate, export, quantise, profile, check, gate.

    run(job, session=…, ledger=…, recorder=…, out=…, checkpoints=…) -> Result

Everything that needs data happens on the devices, by messages; the hub adds up what they
answer. "Known" devices are those that train, "unseen" those that only evaluate. The stages and
their names are what the recorder, and so the dashboard, shows:

    train → evaluate → export → ranges → quantise → evaluate-int8 → profile → golden → gate

Only a candidate that passes every gate is written to ``out``, to wait there for its signature.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

from flwr.serverapp import Grid

from atoll.federation import buffered, evaluation, layout, parameters, release, rounds
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.messages import EvaluateReply
from atoll.federation.plan import Plan
from atoll.federation.progress import Outcome
from atoll.federation.run import Charge, Run
from atoll.federation.task import Grouped, Task
from atoll.fleet import ranges
from atoll.fleet.bundle import Manifest
from atoll.fleet.features import FeatureSpec
from atoll.privacy.ledger import Event, Gaussian, Ledger, Unnoised
from atoll.privacy.modes import HubSession
from atoll.server import candidates, export, fairness, measures, policy, record, spread
from atoll.server.measures import sides_of, total
from atoll.server.policy import Rule, Verdict
from atoll.server.questions import Confusion, Evaluation, Questions, Tally
from atoll.server.recording import Recorder

CALIBRATED_SHARE: Final = 0.9999
"""Share of a tensor's values within its int8 range; the rest saturates."""

LISTED: Final = 200
"""Devices that a run lists as left out; of more, their number alone is told."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run, by whom and over which grid. ``created`` is in Unix seconds.

    ``attempt`` is how often the run has been started, this time included.
    """

    grid: Grid
    plan: Plan
    cohort: Cohort
    task: Task
    run: str
    created: float
    rules: Sequence[Rule] = policy.RULES
    clock: Clock = SYSTEM_CLOCK
    attempt: int = 1
    left_out: Callable[[], Mapping[str, str]] | None = None
    """Says which trainers may not train now by ``cohort.rule``, and why."""

    @property
    def questions(self) -> Questions:
        """Return what asks the cohort."""
        wanted = self.plan.cohort
        return Questions(
            self.grid, self.cohort, wanted.round_timeout, wanted.min_devices, self.clock
        )


class Result(NamedTuple):
    """How a run ended: with a candidate's manifest, or with gates that did not let it pass."""

    manifest: Manifest | None
    verdicts: list[Verdict]
    facts: dict[str, Any]

    @property
    def refused(self) -> str:
        """Name the gates that failed, for a person."""
        failed = [verdict for verdict in self.verdicts if not verdict.passed]
        return "; ".join(f"{verdict.name} ({verdict.detail})" for verdict in failed)


def run(
    job: Job,
    *,
    session: HubSession,
    ledger: Ledger,
    recorder: Recorder,
    out: Path,
    checkpoints: Checkpoints | None = None,
    examples: Ledger | None = None,
) -> Result:
    """Run a plan to its end; raise what stops it.

    That is :class:`RoundFailed` when too few devices answer,
    :class:`atoll.server.export.BadExport` for a model that cannot be exported, and what
    :func:`atoll.federation.rounds.run_rounds` raises.

    ``examples`` is the account of single examples, charged before each round too; a plan with
    ``[privacy.examples]`` does not run without. An example is on one device, so what it spends
    does not depend on which devices take part.
    """
    facts: dict[str, Any] = {}
    protect_examples(job, examples)
    rules = [*job.rules, *policy.rules_of(job.plan)]
    check_groups(job, rules)

    def note(**found: Any) -> None:  # noqa: ANN401 -- JSON
        facts.update(found)
        recorder.metrics(found)

    recorder.stage("train")
    shape = layout.of(job.task, job.plan.seed, job.plan.layers)
    note(layers=shape.counts())
    initial = shape.initial
    recorder.record(
        record.beginning(job.plan, job.task, job.cohort, initial, job.attempt, job.created)
    )
    going = Run(
        job.grid,
        job.plan,
        job.cohort,
        name=job.run,
        session=session,
        charge=_charging(job, ledger, examples),
        on_round=recorder.round,
        checkpoints=checkpoints,
        clock=job.clock,
        left_out=_left_out(job, note),
        frozen=shape.frozen,
    )
    outcome = _train(going, initial, ledger, examples, recorder, note)
    weights = outcome.weights
    digests = {"in": record.of_weights(initial), "out": record.of_weights(weights)}
    recorder.record({"weights": digests})
    if outcome.turns:  # "known" are those that were asked to train
        turns = [outcome.turns.get(name, 0) for name in job.cohort.trainers]
        note(turns={"devices": len(turns), "fewest": min(turns), "most": max(turns)})
        asked = [name for name in job.cohort.trainers if name in outcome.turns]
        job = replace(job, cohort=replace(job.cohort, trainers=asked))
    recorder.stage("evaluate")
    replies = _evaluate(replace(going, cohort=job.cohort), weights)
    note(**measures.of_weights(replies, sides_of(job.cohort.trainers, replies)))
    note(**measures.of_tuned(replies, sides_of(job.cohort.trainers, replies)))
    if job.plan.layers.local:
        verdicts = policy.judge(facts, [policy.WHOLE])
        note(gates=[verdict.plain() for verdict in verdicts])
        return Result(None, verdicts, facts)
    recorder.stage("export")
    exact = export.to_onnx(shape.exported(weights), job.task.input_shape)
    recorder.stage("ranges")
    tensors = export.observed(exact)
    spans = job.questions.activations(export.augment(exact), job.cohort.trainers, tensors)
    recorder.stage("quantise")
    shipped = export.quantise(
        exact, {name: ranges.thresholds(span, CALIBRATED_SHARE) for name, span in spans.items()}
    )
    recorder.stage("evaluate-int8")
    note(**_compare(job, replies, exact, shipped))
    recorder.stage("profile")
    profile = job.questions.reference_profile(
        features_of(job.task), job.task.classes, shipped, job.cohort.trainers
    )
    note(profile={"rows": profile.rows})
    recorder.stage("golden")
    check = candidates.golden_check(profile, job.task.input_shape, exact, shipped, job.run)
    note(golden=check.facts())
    recorder.stage("gate")
    verdicts = policy.judge(facts, rules)
    note(gates=[verdict.plain() for verdict in verdicts])
    if not policy.passed(verdicts):
        return Result(None, verdicts, facts)
    manifest = candidates.write(
        out,
        plan=job.plan,
        task=job.task,
        run=job.run,
        created=job.created,
        model=shipped,
        profile=profile,
        golden=check.golden,
        facts=facts,
        verdicts=verdicts,
        weights=digests,
    )
    recorder.record({"files": record.files_of(manifest)})
    return Result(manifest, verdicts, facts)


def event_of(plan: Plan, connected: int) -> Event:
    """Return what one round costs its population, ``connected`` trainers of which are there.

    The update and its riders are one release. Sampling counts where it amplifies
    (:func:`atoll.federation.release.amplification`), and nowhere else.
    """
    spec = release.update_spec(plan, plan.privacy.clip_norm)
    if not spec.multiplier:
        return Unnoised()
    return Gaussian(spec.multiplier, release.amplification(plan, connected))


def example_event(plan: Plan) -> Gaussian | None:
    """Return what one round costs an example: so many sampled Gaussians, or nothing asked."""
    asked = plan.privacy.examples
    if asked is None:
        return None
    return Gaussian(asked.noise_multiplier, asked.sampling_rate, times=asked.steps)


def features_of(task: Task) -> FeatureSpec:
    """Return what is watched of examples: signals and images by moments, tables by columns."""
    table = len(task.input_shape) == 1
    return FeatureSpec(kind="columns" if table else "channel-stats", channels=task.channels)


def _train(
    going: Run,
    initial: parameters.Vector,
    ledger: Ledger,
    examples: Ledger | None,
    recorder: Recorder,
    note: Callable[..., None],
) -> Outcome:
    plan = going.plan
    run_plan = buffered.run_buffered if plan.asynchrony else rounds.run_rounds
    outcome = run_plan(going, initial)
    spent = ledger.spent()
    finite = isfinite(spent.epsilon_pld)
    privacy: dict[str, Any] = {"delta": spent.delta}
    if finite:
        privacy |= {"epsilon": spent.epsilon_pld, "epsilon_rdp": spent.epsilon_rdp}
    if plan.privacy.budget_epsilon is not None:
        privacy["budget"] = plan.privacy.budget_epsilon
    if examples is not None and plan.privacy.examples is not None:
        of_examples = examples.spent()
        privacy["examples"] = {
            "epsilon": of_examples.epsilon_pld,
            "delta": of_examples.delta,
        }
    reports = recorder.rounds_told()
    ended = [report for report in reports if not report.lost]
    if plan.privacy.clip == "adaptive" and ended:
        privacy["clip_norm"] = ended[-1].clip_norm
    note(
        rounds={
            "planned": plan.rounds,
            "trained": outcome.rounds,
            "lost": len(reports) - len(ended),
            "ended": outcome.ended,
            "seconds": sum(report.seconds for report in ended) / max(len(ended), 1),
            "bytes_up": sum(report.bytes_up for report in reports),
            "bytes_down": sum(report.bytes_down for report in reports),
        },
        privacy=privacy,
        epsilon=spent.epsilon_pld if finite else None,
        delta=spent.delta,
    )
    return outcome


def _charging(job: Job, ledger: Ledger, examples: Ledger | None) -> Charge:
    """Return what charges a round of the job to both accounts."""
    plan = job.plan
    of_example = example_event(plan)

    def charge(number: int, connected: int) -> float | None:
        event = event_of(plan, connected)
        # A round taken up again may find others connected, and then costs something else.
        claimed = plan.cohort.sampling_rate is None or getattr(event, "sampling", None) is not None
        charge_id = f"{job.run}/{number}" + ("" if claimed else "/in-full")
        if examples is not None and of_example is not None:
            examples.charge(f"{job.run}/{number}/examples", of_example)
        spent = ledger.charge(charge_id, event).epsilon_pld
        return spent if isfinite(spent) else None

    return charge


def _left_out(job: Job, note: Callable[..., None]) -> Callable[[], Collection[str]] | None:
    """Return what says who may not train now, noting it in the run's facts when it changes."""
    rule, look_up = job.plan.cohort.rule, job.left_out
    if rule is None or look_up is None:
        return None
    noted: dict[str, Mapping[str, str]] = {}

    def look() -> Collection[str]:
        found = {name: why for name, why in look_up().items() if name in job.cohort.trainers}
        if noted.get("now") != found:
            noted["now"] = found
            trainers = len(job.cohort.trainers)
            listed = dict(list(found.items())[:LISTED])
            note(
                cohort={
                    "rule": rule,
                    "trainers": trainers,
                    "eligible": trainers - len(found),
                    "left_out": listed,
                }
            )
        return found

    return look


def protect_examples(job: Job, examples: Ledger | None) -> None:
    """Check before anything starts that a plan's promise to examples can be kept.

    Raises :class:`BadPlan` without an account of theirs, and
    :class:`atoll.privacy.errors.BadParameters` for a model that mixes examples.
    """
    if job.plan.privacy.examples is None:
        return
    if examples is None:
        raise BadPlan("[privacy.examples] needs a ledger of examples, and this run has none")
    from atoll.federation import example_privacy  # loads Opacus

    shape = layout.of(job.task, job.plan.seed, job.plan.layers)
    example_privacy.check(shape.model, job.task.input_shape)


def check_groups(job: Job, rules: Sequence[Rule]) -> None:
    """Raise :class:`BadPlan` for a gate on fairness where the task tells of no groups."""
    asking = [rule.name for rule in rules if "fairness" in policy.subjects(rule)]
    if asking and not groups_of(job.task):
        raise BadPlan(
            f"the gate {asking[0]!r} is about groups, and the task {job.task.name!r} tells of "
            "none: leave the gate out, or give the task `groups` and `group_of`"
        )


def _evaluate(going: Run, weights: parameters.Vector) -> dict[str, EvaluateReply]:
    """Evaluate the float weights on the devices' held-back data; return the sound replies."""
    sound = evaluation.evaluate(going, weights)
    if len(sound) < going.plan.cohort.min_devices:
        raise RoundFailed(
            f"{len(sound)} of {len(going.cohort.evaluators)} devices evaluated the model; look at "
            "why the others did not, then run it again"
        )
    return sound


def groups_of(task: Task) -> tuple[str, ...]:
    """Return the names of the groups that a task tells of; none for a task without."""
    return task.groups if isinstance(task, Grouped) else ()


def _confusions(found: Mapping[str, Evaluation]) -> dict[str, Confusion]:
    return {name: answer.confusion for name, answer in found.items()}


def _compare(
    job: Job, replies: Mapping[str, EvaluateReply], exact: bytes, shipped: bytes
) -> dict[str, Any]:
    """Evaluate both ONNX models; return the facts about the devices that did all three."""
    classes, groups = len(job.task.classes), groups_of(job.task)
    evaluators = job.cohort.evaluators
    floats = _confusions(job.questions.evaluations(exact, evaluators, classes))
    told = job.questions.evaluations(shipped, evaluators, classes, len(groups))
    ints = _confusions(told)
    everywhere = [name for name in evaluators if name in replies and name in floats.keys() & ints]
    before = {name: Tally(replies[name].correct, replies[name].rows) for name in everywhere}
    after = {name: Tally.of(floats[name]) for name in everywhere}
    changed = total(after, everywhere).accuracy - total(before, everywhere).accuracy
    sides, least = sides_of(job.cohort.trainers, everywhere), job.plan.cohort.min_devices
    tallies = {name: Tally.of(ints[name]) for name in everywhere}
    by_group = {name: found for name in everywhere if (found := told[name].by_group) is not None}
    fair = fairness.of_devices(by_group, groups, job.task.classes, least) if groups else None
    return {
        **measures.of_models(floats, ints, sides),
        **spread.by_cohort(tallies, sides, job.cohort.labels, least),
        **({"fairness": fair} if fair is not None else {}),
        "devices": {
            "trainers": len(job.cohort.trainers),
            "asked": len(evaluators),
            "evaluated": len(everywhere),
        },
        "model": {
            "classes": classes,
            "float_bytes": len(exact),
            "int8_bytes": len(shipped),
            "export_changed": abs(changed),
        },
    }
