"""How fast and in what memory the hub adds a cohort's updates up, as they arrive.

    python -m benchmarks.aggregation [--json] [--parameters 1000000] [--updates 1000]

What is measured is the hub's side of a sum in the clear (:class:`atoll.privacy.plain.PlainHub`),
from the bytes of each reply to the mean: it reads the frame, checks whose it is, holds each value
against the bound, adds, and at the end decodes. Terms are those of a plan's 16 bits: without noise
they take two bytes a value, with it four.

*Bandwidth.* The yardstick is ``a += b`` of numpy with float32 vectors as long as the model, on one
thread: what a hub would take that trusts everything. Both add a group of updates in turn, none of
which has been looked at since it came, so that neither finds one in a core's own cache; counted
is CPU time an update, the least of all groups. 80 % means that the yardstick's time is at
least 0.8 of ours. Bytes are no measure here: an update without noise has half of a float's.

*Memory* is the most that the process occupies above what it did when the sum was opened and
nothing had come, with a reply there at a time; the goal is two float32 models and one update as it
arrives. A whole round on the in-process engine takes more, for the weights before and after and for
what it decodes into, but no more for a large cohort than for a small one; its devices keep nothing.

*The peer* is Flower's ``aggregate_arrayrecords``, with which its strategies average. It is given
the replies' records as they lie in memory once they have come. It needs all of them, so they are
in its memory; making them is not in its time. Each side runs in a process of its own.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from atoll.privacy import frames, terms, update
from atoll.privacy.keystream import Keystream
from atoll.privacy.plain import PlainHub, PlainHubSession
from atoll.privacy.sums import CONTRIBUTE, RoundKey, SumSpec, Total
from atoll.privacy.update import UpdateSpec
from benchmarks import engine, process
from benchmarks.rows import Row, report

MILLION: Final = 1_000_000
COHORT: Final = 1000
"""Goals are set for this size of model and cohort."""
SHARE: Final = 0.8
FASTER: Final = 8
LEANER: Final = 50

_GROUP: Final = 40
"""Updates that are there at once where only time is measured: more than a core's cache holds."""
_KEY: Final = RoundKey("benchmark", 1)
_BITS: Final = 16


class Took(NamedTuple):
    """What a side took: seconds in all, and bytes of memory beyond what was there before."""

    seconds: float
    memory: int


class Rate(NamedTuple):
    """Seconds of CPU time for an update: ours, and the yardstick's."""

    ours: float
    added: float


def specs(parameters: int, updates: int, noise: float) -> tuple[UpdateSpec, SumSpec]:
    """Return how updates become integers, and the sum of them."""
    survivors = max(1, 2 * updates // 3)
    one = UpdateSpec(1.0, _BITS, noise, survivors)
    return one, SumSpec(_KEY, parameters, one.bound, updates, survivors)


def open_sum(spec: SumSpec) -> tuple[PlainHub, list[str]]:
    """Return a sum that waits for terms, and whose."""
    names = [f"device-{number:04}" for number in range(spec.parties)]
    hub = PlainHubSession().open(spec, names)
    hub.start()
    return hub, names


def written(spec: SumSpec, count: int) -> list[memoryview]:
    """Return ``count`` terms as they travel."""
    rng = np.random.default_rng(0)
    return [
        terms.to_bytes(
            rng.integers(-spec.bound, spec.bound, spec.length, endpoint=True),
            spec.length,
            spec.bound,
        )
        for _ in range(count)
    ]


def replies(names: Sequence[str], values: Sequence[memoryview]) -> Iterator[tuple[str, bytes]]:
    """Yield each device's reply, made when it is asked for."""
    for number, name in enumerate(names):
        head = frames.address(_KEY, CONTRIBUTE, name)
        yield name, frames.pack(head, [values[number % len(values)]])


def rate(parameters: int, updates: int, noise: float) -> Rate:
    """Measure updates and float32 vectors, a group of each in turn."""
    _, spec = specs(parameters, updates, noise)
    hub, names = open_sum(spec)
    group = min(_GROUP, updates - 1)
    values = written(spec, group)
    rng = np.random.default_rng(1)
    floats = [rng.normal(size=parameters).astype(np.float32) for _ in range(group)]
    total = np.zeros(parameters, np.float32)
    # The first of each finds a sum whose pages are not there yet.
    for name, reply in replies(names[:1], values):
        hub.receive(name, reply)
    total += floats[0]

    def fold(arrived: Sequence[tuple[str, bytes]]) -> None:
        for name, reply in arrived:
            hub.receive(name, reply)

    def add() -> None:
        for vector in floats:
            np.add(total, vector, out=total)

    mine, added = [], []
    for start in range(1, updates - group + 1, group):
        arrived = list(replies(names[start : start + group], values))
        mine.append(process.cpu_time(partial(fold, arrived))[1] / group)
        added.append(process.cpu_time(add)[1] / group)
    return Rate(min(mine), min(added))


def ours(parameters: int, updates: int, noise: float) -> Took:
    """Add up a whole cohort, a reply at a time, and check the sum."""
    one, spec = specs(parameters, updates, noise)
    values = written(spec, min(8, updates))
    hub, names = open_sum(spec)
    before = process.resident()
    (total, folding), most = process.peak(lambda: folded(hub, names, values))
    shares = [len(range(first, updates, len(values))) for first in range(len(values))]
    wanted = np.zeros(parameters, np.int64)
    for share, value in zip(shares, values, strict=True):
        wanted += share * np.frombuffer(value, terms.dtype(spec.bound)).astype(np.int64)
    assert np.array_equal(total.values, wanted), "a wrong sum"

    def mean() -> npt.NDArray[np.float64]:
        released = update.release(total.values, one, Keystream.fresh())
        return update.decode(released, one).update / updates

    return Took(folding + process.cpu_time(mean)[1], most - before)


def both(parameters: int, updates: int, noise: float) -> tuple[Took, Rate]:
    """Return what a cohort took, and then the rate; a process that is new grows as it should."""
    return ours(parameters, updates, noise), rate(parameters, updates, noise)


def folded(
    hub: PlainHub, names: Sequence[str], values: Sequence[memoryview]
) -> tuple[Total, float]:
    """Return the sum of every device's reply, and the seconds that the hub worked for it."""

    def fold() -> float:
        return sum(
            process.cpu_time(partial(hub.receive, name, reply))[1]
            for name, reply in replies(names, values)
        )

    seconds = fold()
    total, took = process.cpu_time(hub.advance)
    return total, seconds + took


def whole_round(parameters: int, devices: int) -> int:
    """Return the bytes that a round on the in-process engine takes, from weights to weights."""
    before = process.resident()
    _, most = process.peak(lambda: engine.seconds_a_round(parameters, devices, 1))
    return most - before


def flowers(parameters: int, updates: int) -> Took:
    """Average a whole cohort's records with Flower."""
    vector = np.random.default_rng(0).normal(size=parameters).astype(np.float32)
    before = process.resident()

    def aggregate() -> float:
        records = [
            RecordDict(
                {
                    "arrays": ArrayRecord({"weights": Array(vector)}),
                    "metrics": MetricRecord({"num-examples": 1}),
                }
            )
            for _ in range(updates)
        ]
        mean, seconds = process.cpu_time(lambda: aggregate_arrayrecords(records, "num-examples"))
        assert np.allclose(mean["weights"].numpy(), vector, atol=1e-4)
        return seconds

    seconds, most = process.peak(aggregate)
    return Took(seconds, most - before)


def wanted(parameters: int, updates: int) -> bool:
    """Tell whether goals are set for such a cohort."""
    return parameters == MILLION and updates == COHORT


def rows(parameters: int, updates: int) -> list[Row]:
    """Measure both kinds of terms, and the peer."""
    theirs = process.apart(flowers, parameters, updates)
    goals = wanted(parameters, updates)
    found = []
    for noise, what in ((0.0, "16 bits, no noise"), (1.0, "16 bits, noise z = 1")):
        case = f"{updates:,} updates of {parameters:,} parameters, {what}"
        mine, speed = process.apart(both, parameters, updates, noise)
        _, spec = specs(parameters, updates, noise)
        model, arrives = 4 * parameters, terms.dtype(spec.bound).itemsize * parameters
        found += [
            _row(case, "hub, add an update", "ms", 1e3 * speed.ours, 1e3 * speed.added,
                 "float32 +=", 1e3 * speed.added / SHARE if goals else None),
            _row(case, "aggregate a cohort", "s", mine.seconds, theirs.seconds, _FLOWER,
                 theirs.seconds / FASTER if goals else None),
            _row(case, "memory, against the peer", "MB", mine.memory / 1e6, theirs.memory / 1e6,
                 _FLOWER, theirs.memory / 1e6 / LEANER if goals else None),
            _row(case, "memory, against two models and an update", "MB", mine.memory / 1e6,
                 None, None, (2 * model + arrives) / 1e6 if goals else None),
        ]  # fmt: skip
    few = min(10, updates)
    case = f"{updates:,} updates of {parameters:,} parameters, in-process engine"
    many, least = (process.apart(whole_round, parameters, devices) for devices in (updates, few))
    name = f"the same with {few} devices"
    found.append(_row(case, "memory of a whole round", "MB", many / 1e6, least / 1e6, name, None))
    return found


_FLOWER: Final = "Flower's aggregate_arrayrecords, float32"


def _row(
    case: str,
    metric: str,
    unit: str,
    ours: float,
    peer: float | None,
    peer_name: str | None,
    goal: float | None,
) -> Row:
    return Row(
        case=case,
        metric=metric,
        unit=unit,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        ratio=None if peer is None else peer / ours,
        goal=goal,
        met=None if goal is None else ours <= goal,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--parameters", type=int, default=MILLION)
    parser.add_argument("--updates", type=int, default=COHORT)
    given = parser.parse_args(arguments)
    return report(rows(given.parameters, given.updates), given.json)


if __name__ == "__main__":
    sys.exit(main())
