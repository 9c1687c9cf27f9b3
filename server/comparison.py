"""How the models of a run do on the same devices: as trained, exported, and quantised."""

from collections.abc import Mapping
from typing import Any

from atoll.federation.messages import EvaluateReply
from atoll.federation.task import Task
from atoll.server import fairness, measures, spread
from atoll.server.measures import sides_of, total
from atoll.server.questions import Confusion, Evaluation, Questions, Tally
from atoll.server.task_check import groups_of


def compare(
    questions: Questions,
    task: Task,
    replies: Mapping[str, EvaluateReply],
    exact: bytes,
    shipped: bytes,
) -> dict[str, Any]:
    """Evaluate both ONNX models, float and int8; return the facts about them.

    ``replies`` are of the float weights before they were exported. The facts are about the
    devices that evaluated all three.
    """
    classes, groups, cohort = len(task.classes), groups_of(task), questions.cohort
    floats = _confusions(questions.evaluations(exact, cohort.evaluators, classes))
    told = questions.evaluations(shipped, cohort.evaluators, classes, len(groups))
    ints = _confusions(told)
    both = floats.keys() & ints
    everywhere = [name for name in cohort.evaluators if name in replies and name in both]
    before = {name: Tally(replies[name].correct, replies[name].rows) for name in everywhere}
    after = {name: Tally.of(floats[name]) for name in everywhere}
    changed = total(after, everywhere).accuracy - total(before, everywhere).accuracy
    sides, least = sides_of(cohort.trainers, everywhere), questions.least
    tallies = {name: Tally.of(ints[name]) for name in everywhere}
    by_group = {name: found for name in everywhere if (found := told[name].by_group) is not None}
    fair = fairness.of_devices(by_group, groups, task.classes, least) if groups else None
    return {
        **measures.of_models(floats, ints, sides),
        **spread.by_cohort(tallies, sides, cohort.labels, least),
        **({"fairness": fair} if fair is not None else {}),
        "devices": {
            "trainers": len(cohort.trainers),
            "asked": len(cohort.evaluators),
            "evaluated": len(everywhere),
        },
        "model": {
            "classes": classes,
            "float_bytes": len(exact),
            "int8_bytes": len(shipped),
            "export_changed": abs(changed),
        },
    }


def _confusions(found: Mapping[str, Evaluation]) -> dict[str, Confusion]:
    return {name: answer.confusion for name, answer in found.items()}
