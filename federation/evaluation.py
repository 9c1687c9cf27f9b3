"""Questions to a cohort outside the rounds: evaluation of weights, and queries.

    evaluate(grid, cohort, task, weights, timeout) -> {device: EvaluateReply}
    ask(grid, nodes, name, payload, timeout) -> {device: bytes}

Both leave out devices that do not answer well and in time; who decides on the answers checks that
enough are there.
"""

from collections.abc import Mapping
from contextlib import suppress

from flwr.serverapp import Grid
from msgspec import structs

from atoll.federation import layout, messages, parameters
from atoll.federation.cohort import Cohort
from atoll.federation.errors import BadMessage
from atoll.federation.exchange import SYSTEM_CLOCK, Clock, Replies, exchange
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan


def evaluate(
    grid: Grid,
    cohort: Cohort,
    task: str,
    weights: Vector,
    timeout: float,
    *,
    clock: Clock = SYSTEM_CLOCK,
    plan: Plan | None = None,
    run: str = "",
    frozen: str = "",
) -> dict[str, messages.EvaluateReply]:
    """Evaluate float32 ``weights`` on every evaluator's held-back data; rows, correct, loss.

    With the ``plan`` and name of a ``run`` devices add their own layers and fine-tune, as the plan
    says; ``frozen`` is the digest of :class:`atoll.federation.layout.Layout`.
    """
    ask = messages.EvaluateAsk(task=task, weights=parameters.to_bytes(weights), split="test")
    if plan is not None:
        ask = structs.replace(
            ask,
            run=run,
            seed=plan.seed,
            layers=layout.encode(plan.layers),
            frozen=frozen,
            batch_size=plan.training.batch_size,
            learning_rate=plan.training.learning_rate,
            momentum=plan.training.momentum,
        )
    content = messages.pack(ask)
    replies = exchange(
        grid,
        cohort.nodes,
        messages.EVALUATE,
        dict.fromkeys(cohort.evaluators, content),
        timeout,
        clock=clock,
    )
    return _well_formed(replies, messages.EvaluateReply)


def ask(
    grid: Grid,
    nodes: Mapping[str, int],
    name: str,
    payload: bytes,
    timeout: float,
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> dict[str, bytes]:
    """Put one query to each of ``nodes`` (device to Flower node id) and return the answers."""
    content = messages.pack(messages.QueryAsk(name=name, payload=payload))
    replies = exchange(
        grid, nodes, messages.QUERY, dict.fromkeys(nodes, content), timeout, clock=clock
    )
    answers = _well_formed(replies, messages.QueryReply)
    return {device: answer.payload for device, answer in answers.items()}


def _well_formed(replies: Replies, kind: type[messages.Kind]) -> dict[str, messages.Kind]:
    found = {}
    for device, content in replies.content.items():
        with suppress(BadMessage):
            found[device] = messages.unpack(content, kind)
    return found
