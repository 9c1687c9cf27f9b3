"""From a plan to a candidate: train, evaluate, export, quantise, profile, check, gate.

    run(job, session=…, ledger=…, recorder=…, out=…, checkpoints=…) -> Result

Everything that needs data happens on the devices, by messages; the hub adds up what they
answer. "Known" devices are those that train, "unseen" those that only evaluate. The stages and
their names are what the recorder, and so the dashboard, shows:

    train → evaluate → export → ranges → quantise → evaluate-int8 → profile → golden → gate

Only a candidate that passes every gate is written to ``out``, to wait there for its signature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from flwr.serverapp import Grid

from atoll.federation import buffered, evaluation, layout, rounds
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.cohort import Cohort
from atoll.federation.errors import RoundFailed
from atoll.federation.exchange import SYSTEM_CLOCK, Clock
from atoll.federation.messages import EvaluateReply
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.progress import Outcome
from atoll.federation.run import RoundReport, Run
from atoll.federation.task import Task
from atoll.fleet import ranges
from atoll.fleet.bundle import Manifest
from atoll.fleet.features import FeatureSpec
from atoll.privacy.ledger import Ledger
from atoll.privacy.modes import HubSession
from atoll.server import candidates, eligibility, export, measures, policy, record, task_check
from atoll.server.charging import Accounts
from atoll.server.comparison import compare
from atoll.server.policy import Rule, Verdict
from atoll.server.questions import Questions
from atoll.server.recording import Recorder

CALIBRATED_SHARE: Final = 0.9999
"""Share of a tensor's values within its int8 range; the rest saturates."""


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
    left_out: eligibility.Reasons | None = None
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

    ``ledger`` is the account of devices and ``examples`` that of single examples; a plan with
    ``[privacy.examples]`` does not run without.
    """
    plan, task = job.plan, job.task
    facts: dict[str, Any] = {}
    rules = [*job.rules, *policy.rules_of(plan)]
    task_check.check_examples(plan, task, charged=examples is not None)
    task_check.check_groups(task, rules)

    def note(**found: Any) -> None:  # noqa: ANN401 -- JSON
        facts.update(found)
        recorder.metrics(found)

    recorder.stage("train")
    shape = layout.of(task, plan.seed, plan.layers)
    note(layers=shape.counts())
    initial = shape.initial
    recorder.record(record.beginning(plan, task, job.cohort, initial, job.attempt, job.created))
    accounts = Accounts(plan, job.run, ledger, examples)
    trainers = job.cohort.trainers
    going = Run(
        job.grid,
        plan,
        job.cohort,
        name=job.run,
        session=session,
        charge=accounts.charge,
        on_round=recorder.round,
        checkpoints=checkpoints,
        clock=job.clock,
        left_out=eligibility.noted(
            plan.cohort.rule, job.left_out, trainers, lambda found: note(cohort=found)
        ),
        frozen=shape.frozen,
        running=shape.running,
    )
    outcome = (buffered.run_buffered if plan.asynchrony else rounds.run_rounds)(going, initial)
    note(**_of_training(plan, outcome, recorder.rounds_told(), accounts.facts()))
    weights = outcome.weights
    digests = {"in": record.of_weights(initial), "out": record.of_weights(weights)}
    recorder.record({"weights": digests})
    if outcome.turns:  # "known" are those that were asked to train
        turns = [outcome.turns.get(name, 0) for name in trainers]
        note(turns={"devices": len(turns), "fewest": min(turns), "most": max(turns)})
        trainers = [name for name in trainers if name in outcome.turns]
        job = replace(job, cohort=replace(job.cohort, trainers=trainers))
    recorder.stage("evaluate")
    replies = _evaluate(going, weights)
    sides = measures.sides_of(trainers, replies)
    note(**measures.of_weights(replies, sides))
    note(**measures.of_tuned(replies, sides))
    if plan.layers.local:
        verdicts = policy.judge(facts, [policy.WHOLE])
        note(gates=[verdict.plain() for verdict in verdicts])
        return Result(None, verdicts, facts)
    recorder.stage("export")
    exact = export.to_onnx(shape.exported(weights), task.input_shape)
    recorder.stage("ranges")
    tensors = export.observed(exact)
    spans = job.questions.activations(export.augment(exact), trainers, tensors)
    recorder.stage("quantise")
    shipped = export.quantise(
        exact, {name: ranges.thresholds(span, CALIBRATED_SHARE) for name, span in spans.items()}
    )
    recorder.stage("evaluate-int8")
    note(**compare(job.questions, task, replies, exact, shipped))
    recorder.stage("profile")
    profile = job.questions.reference_profile(features_of(task), task.classes, shipped, trainers)
    note(profile={"rows": profile.rows})
    recorder.stage("golden")
    check = candidates.golden_check(profile, task.input_shape, exact, shipped, job.run)
    note(golden=check.facts())
    recorder.stage("gate")
    verdicts = policy.judge(facts, rules)
    note(gates=[verdict.plain() for verdict in verdicts])
    if not policy.passed(verdicts):
        return Result(None, verdicts, facts)
    manifest = candidates.write(
        out,
        plan=plan,
        task=task,
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


def features_of(task: Task) -> FeatureSpec:
    """Return what is watched of examples: signals and images by moments, tables by columns."""
    table = len(task.input_shape) == 1
    return FeatureSpec(kind="columns" if table else "channel-stats", channels=task.channels)


def _of_training(
    plan: Plan, outcome: Outcome, reports: Sequence[RoundReport], spent: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the facts about the rounds, and those of what is ``spent``."""
    ended = [report for report in reports if not report.lost]
    adapted = plan.privacy.clip == "adaptive" and ended
    norm = {"clip_norm": ended[-1].clip_norm} if adapted else {}
    return {
        "rounds": {
            "planned": plan.rounds,
            "trained": outcome.rounds,
            "averaged": outcome.averaged,
            "lost": len(reports) - len(ended),
            "ended": outcome.ended,
            "seconds": sum(report.seconds for report in ended) / max(len(ended), 1),
            "bytes_up": sum(report.bytes_up for report in reports),
            "bytes_down": sum(report.bytes_down for report in reports),
        },
        **spent,
        "privacy": {**spent["privacy"], **norm},
    }


def _evaluate(going: Run, weights: Vector) -> dict[str, EvaluateReply]:
    """Evaluate the float weights on the devices' held-back data; too few answers end the run."""
    replies = evaluation.evaluate(going, weights)
    if len(replies) < going.plan.cohort.min_devices:
        raise RoundFailed(
            f"{len(replies)} of {len(going.cohort.evaluators)} devices evaluated the model; look "
            "at why the others did not, then run it again"
        )
    return replies
