"""The device's side of a run, as a Flower ClientApp over an installed task.

The hub sends weights, numbers and phases of a sum; never code. What may not be answered
raises, and the node turns that into an error reply, which the hub counts as a drop-out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from atoll.federation import messages, parameters, training
from atoll.federation.errors import BadMessage
from atoll.federation.plan import Training
from atoll.federation.task import Split, Task
from atoll.privacy import update
from atoll.privacy.keystream import Keystream
from atoll.privacy.sums import CONTRIBUTE, Integers, PartySum

KEPT_RUNS: Final = 4
"""Sums of the latest runs are kept; an older run has ended."""


def build(
    task: Task,
    data: Path,
    party: Callable[[str], PartySum],
    queries: Mapping[str, Callable[[bytes], bytes]],
) -> ClientApp:
    """Return the ClientApp for ``task`` on the examples under ``data``.

    ``party`` makes this device's side of a sum from a privacy mode's name, once per run.
    ``queries`` answers questions by name, bytes to bytes.
    """
    app = ClientApp()
    sums = _Sums(party)

    @app.train("sum")
    def phase(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.SumAsk)
        if ask.phase == CONTRIBUTE:
            raise BadMessage("a contribution was asked for without training")
        return _reply(message, messages.SumReply(payload=sums.answer(ask, None)))

    @app.train()
    def contribute(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.SumAsk)
        work = messages.unpack(message.content, messages.TrainAsk)
        if ask.phase != CONTRIBUTE:
            raise BadMessage(f"training was asked for in the {ask.phase!r} phase")
        _check_task(task, work.task)
        term, loss = _local_update(task, data, work, ask)
        return _reply(
            message,
            messages.SumReply(payload=sums.answer(ask, term)),
            messages.TrainReply(loss=loss),
        )

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.EvaluateAsk)
        _check_task(task, ask.task)
        split: Split = "train" if ask.split == "train" else "test"
        done = training.evaluate(
            task.model(0), parameters.from_bytes(ask.weights), task.load(data, split)
        )
        return _reply(
            message,
            messages.EvaluateReply(rows=done.rows, correct=done.correct, loss=done.loss),
        )

    @app.query()
    def query(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.QueryAsk)
        if ask.name not in queries:
            raise BadMessage(f"this device answers no query named {ask.name!r}")
        return _reply(message, messages.QueryReply(payload=queries[ask.name](ask.payload)))

    return app


class _Sums:
    """This device's sides of sums, one per run, the latest kept."""

    def __init__(self, party: Callable[[str], PartySum]) -> None:
        self._party = party
        self._by_run: dict[tuple[str, str], PartySum] = {}

    def answer(self, ask: messages.SumAsk, term: Integers | None) -> bytes:
        key = (ask.run, ask.mode)
        if key not in self._by_run:
            self._by_run[key] = self._party(ask.mode)
        while len(self._by_run) > KEPT_RUNS:
            del self._by_run[next(iter(self._by_run))]
        return self._by_run[key].answer(ask.spec, ask.phase, ask.payload, term)


def _local_update(
    task: Task, data: Path, work: messages.TrainAsk, ask: messages.SumAsk
) -> tuple[Integers, float]:
    seed = training.local_seed(work.seed, ask.round, ask.party)
    before = parameters.from_bytes(work.weights)
    done = training.train(
        task.model(0),
        before,
        task.load(data, "train"),
        Training(
            local_epochs=work.local_epochs,
            batch_size=work.batch_size,
            learning_rate=work.learning_rate,
            momentum=work.momentum,
        ),
        seed,
    )
    spec = update.UpdateSpec(
        clip_norm=work.clip_norm,
        bits=work.bits,
        noise_multiplier=work.noise_multiplier,
        # No number of its own: the noise must hold for the fewest that the sum allows.
        survivors=ask.min_survivors,
    )
    # Without noise there is nothing to keep secret in the rounding, and a seed makes the run
    # repeatable. With noise, rounding draws from the system's entropy like the noise itself.
    rng = Keystream.fresh() if work.noise_multiplier else Keystream.replayable(seed)
    return update.encode(done.weights - before, spec, rng), done.loss


def _check_task(task: Task, wanted: str) -> None:
    if task.name != wanted:
        raise BadMessage(f"this device trains {task.name!r}, not {wanted!r}")


def _reply(message: Message, *records: messages.Record) -> Message:
    return Message(messages.pack(*records), reply_to=message)
