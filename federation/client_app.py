"""The device's side of a run, as a Flower ClientApp over an installed task.

The hub sends weights, numbers and phases of a sum; never code. What may not be answered
raises, and the node turns that into an error reply, which the hub counts as a drop-out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from atoll.federation import local_update, messages
from atoll.federation.errors import BadMessage
from atoll.federation.kept import RUNS, Kept, KeptHere
from atoll.federation.task import Task
from atoll.privacy.errors import Refused
from atoll.privacy.sums import CONTRIBUTE, Integers, PartySum


class Answered(Protocol):
    """The last round of each run in which this device said anything; it must never forget.

    What a side of a sum promises (one contribution, one list of survivors, one sum opened) it
    keeps in memory. Were a round answered anew after a restart, the hub could have the same
    terms opened for two lists and subtract.
    """

    def last(self, run: str) -> int:
        """Return the number of that round; 0 for none."""
        ...

    def note(self, run: str, number: int) -> None:
        """Remember a round, durably, before it is answered."""
        ...


class AnsweredHere:
    """Remembers as long as the process lives: for the in-process engine and for tests."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def last(self, run: str) -> int:
        """Return the number of that round; 0 for none."""
        return self._last.get(run, 0)

    def note(self, run: str, number: int) -> None:
        """Remember a round."""
        self._last[run] = number


@dataclass(frozen=True, slots=True)
class Floor:
    """What a device asks of a plan, whatever the hub says.

    ``noise`` is the least multiplier of the noise that devices add to a whole release, riders
    included; where the hub sees each term, in ``plain``, of what this device adds to its own.
    ``devices`` is the least number of devices among which its update is to be hidden.
    """

    noise: float = 0.0
    devices: int = 1

    def check(self, work: messages.TrainAsk, ask: messages.SumAsk) -> None:
        """Raise :class:`Refused` for a round that does not come up to it."""
        if ask.min_survivors < self.devices:
            raise Refused(
                f"this device trains where at least {self.devices} devices are summed; this "
                f"round is content with {ask.min_survivors}"
            )
        spec = local_update.spec_of(work, ask)
        added = spec.multiplier if work.noise == "distributed" else 0.0
        if ask.mode == "plain":
            added /= math.sqrt(spec.adders)
        if added < self.noise:
            raise Refused(
                f"this device trains where devices add noise of multiplier {self.noise:g} or "
                f"more; this round's is {added:.3g}"
            )


NO_FLOOR: Final = Floor()


def build(
    task: Task,
    data: Path,
    party: Callable[[str], PartySum],
    queries: Mapping[str, Callable[[bytes], bytes]],
    answered: Answered | None = None,
    floor: Floor = NO_FLOOR,
    kept: Kept | None = None,
) -> ClientApp:
    """Return the ClientApp for ``task`` on the examples under ``data``.

    ``party`` makes this device's side of a sum from a privacy mode's name, once per run.
    ``queries`` answers questions by name, bytes to bytes. ``answered`` outlives the process on
    a device, and so does ``kept``. ``floor`` is the device's own word on plans.
    """
    app = ClientApp()
    kept = kept or KeptHere()
    sums = _Sums(party, answered or AnsweredHere(), floor)

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
        floor.check(work, ask)
        # Before anything is trained or kept: a round that is refused leaves no trace.
        sums.admit(ask)
        term, loss = local_update.make(task, data, work, ask, kept)
        return _reply(
            message,
            messages.SumReply(payload=sums.answer(ask, term)),
            messages.TrainReply(loss=loss),
        )

    @app.evaluate()
    def evaluate(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.EvaluateAsk)
        _check_task(task, ask.task)
        if ask.split != "test":
            raise BadMessage("a device evaluates on its held-back examples alone")
        from atoll.federation import personal  # loads torch, which a waiting device need not hold

        return _reply(message, personal.evaluate(task, data, ask, kept, tune=sums.open_handed()))

    @app.query()
    def query(message: Message, _: Context) -> Message:
        ask = messages.unpack(message.content, messages.QueryAsk)
        if ask.name not in queries:
            raise BadMessage(f"this device answers no query named {ask.name!r}")
        return _reply(message, messages.QueryReply(payload=queries[ask.name](ask.payload)))

    return app


class _Sums:
    """This device's sides of sums, one per run, the latest kept."""

    def __init__(
        self, party: Callable[[str], PartySum], answered: Answered, floor: Floor = NO_FLOOR
    ) -> None:
        self._party = party
        self._answered = answered
        self._floor, self._devices = floor, floor.devices
        self._by_run: dict[str, _Side] = {}

    def answer(self, ask: messages.SumAsk, term: Integers | None) -> bytes:
        """Answer one phase; raise :class:`Refused` for what must not be answered."""
        side = self.admit(ask)
        if ask.round > self._answered.last(ask.run):
            self._answered.note(ask.run, ask.round)
        return side.party.answer(ask.spec, ask.phase, ask.payload, term)

    def open_handed(self) -> bool:
        """Say whether this device tells the hub what it has learned by itself, in no sum."""
        try:
            self._party("plain")
        except Refused:
            return False
        return self._floor == NO_FLOOR

    def admit(self, ask: messages.SumAsk) -> "_Side":
        """Return this device's side of a run; raise :class:`Refused` for what it has no part in."""
        if ask.round < 1:
            raise Refused(f"there is no round {ask.round}")
        if ask.min_survivors < self._devices:
            raise Refused(f"a sum over {ask.min_survivors} devices hides too little here")
        side = self._by_run.get(ask.run)
        if side is None:
            side = _Side(ask.mode, self._party(ask.mode), self._answered.last(ask.run))
            self._by_run[ask.run] = side
        while len(self._by_run) > RUNS:
            del self._by_run[next(iter(self._by_run))]
        if ask.mode != side.mode:
            raise Refused(f"run {ask.run} sums in {side.mode!r}; a run has one mode")
        if ask.round <= side.floor:
            raise Refused(f"round {ask.round} was answered before this process remembers")
        return side


class _Side(NamedTuple):
    """This device's side of a run's sums; ``floor`` is the last round of an earlier process."""

    mode: str
    party: PartySum
    floor: int


def _check_task(task: Task, wanted: str) -> None:
    if task.name != wanted:
        raise BadMessage(f"this device trains {task.name!r}, not {wanted!r}")


def _reply(message: Message, *records: messages.Record) -> Message:
    return Message(messages.pack(*records), reply_to=message)
