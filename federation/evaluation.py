"""Questions to a cohort outside the rounds: evaluation of weights, and queries.

    evaluate(run, weights) -> {device: EvaluateReply}
    ask(grid, nodes, name, payload, timeout) -> {device: bytes}

Both leave out devices that do not answer well and in time; who decides on the answers checks that
enough are there.
"""

import math
from collections.abc import Mapping
from contextlib import suppress

from flwr.serverapp import Grid

from atoll.federation import layout, messages, parameters
from atoll.federation.errors import BadMessage
from atoll.federation.exchange import SYSTEM_CLOCK, Clock, Replies, exchange
from atoll.federation.parameters import Vector
from atoll.federation.run import Run


def evaluate(run: Run, weights: Vector) -> dict[str, messages.EvaluateReply]:
    """Evaluate float32 ``weights`` on every evaluator's held-back data; rows, correct, loss.

    Devices add their own layers and fine-tune, as the run's plan says.
    """
    plan = run.plan
    question = messages.EvaluateAsk(
        task=plan.task,
        weights=parameters.to_bytes(weights),
        split="test",
        run=run.name,
        seed=plan.seed,
        layers=layout.encode(plan.layers),
        frozen=run.frozen,
        batch_size=plan.training.batch_size,
        learning_rate=plan.training.learning_rate,
        momentum=plan.training.momentum,
    )
    content = messages.pack(question)
    replies = exchange(
        run.grid,
        run.cohort.nodes,
        messages.EVALUATE,
        dict.fromkeys(run.cohort.evaluators, content),
        plan.cohort.round_timeout,
        clock=run.clock,
    )
    found = _well_formed(replies, messages.EvaluateReply)
    return {device: reply for device, reply in found.items() if _sound(reply)}


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


def _sound(reply: messages.EvaluateReply) -> bool:
    """Tell whether these can be counts of examples; a device that did not fine-tune says -1."""
    return 0 <= reply.correct <= reply.rows >= reply.correct_tuned >= -1 and math.isfinite(
        reply.loss
    )


def _well_formed(replies: Replies, kind: type[messages.Kind]) -> dict[str, messages.Kind]:
    found = {}
    for device, content in replies.content.items():
        with suppress(BadMessage):
            found[device] = messages.unpack(content, kind)
    return found
