"""Accuracy between rounds, for plans with ``evaluate_every``.

The weights that the run would end with now go to the evaluators that are connected, as at the
run's end (:mod:`atoll.federation.evaluation`). Nothing of it enters the sum, the next round or
the ledger, and a question that too few answer soundly is no failure: the round has no accuracy
then. It is off unless a plan asks for it, because it costs a message to each device, waits for
the slowest one, and the counts in the answers are neither summed privately nor noised.
"""

from dataclasses import replace

from msgspec import structs

from atoll.federation.evaluation import evaluate
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.federation.run import RoundReport, Run


def due(plan: Plan, trained: int) -> bool:
    """Tell whether devices are to be asked once ``trained`` rounds are in the weights."""
    return plan.evaluate_every is not None and trained % plan.evaluate_every == 0


def _untuned(plan: Plan) -> Plan:
    """Return the plan without fine-tuning, which is for the run's end."""
    return structs.replace(plan, layers=structs.replace(plan.layers, fine_tune=()))


def measured(run: Run, report: RoundReport, weights: Vector) -> RoundReport:
    """Return the report with the accuracy of ``weights``, float32 ``(n,)``, and what asking cost.

    The accuracy is over the examples of all devices that answered, each example counting once.
    """
    connected, nodes = set(run.grid.get_node_ids()), run.cohort.nodes
    there = [name for name in run.cohort.evaluators if nodes[name] in connected]
    began = run.clock.now()
    cohort = replace(run.cohort, evaluators=there)
    answers = evaluate(replace(run, cohort=cohort, plan=_untuned(run.plan)), weights).values()
    rows = sum(one.rows for one in answers)
    enough = rows > 0 and len(answers) >= run.plan.cohort.min_devices
    return replace(
        report,
        accuracy=sum(one.correct for one in answers) / rows if enough else None,
        evaluated=rows if enough else 0,
        evaluate_seconds=run.clock.now() - began,
        bytes_down=report.bytes_down + weights.nbytes * len(there),
    )
