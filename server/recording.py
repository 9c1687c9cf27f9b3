"""What a run tells about itself while it goes on: stages, rounds, measurements, and its record.

:class:`Recorder` is the seam; :class:`SqlRecorder` writes the hub's tables, which API and
dashboard read, and :class:`MemoryRecorder` keeps everything for tests and simulations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import RowMapping, delete, insert, select, update

from atoll.federation.run import RoundReport
from atoll.server.schema import rounds, runs
from atoll.server.store import Store


class Recorder(Protocol):
    """Hears what a run does, as it does it."""

    def stage(self, name: str) -> None:
        """Note that the run has come to the stage ``name``."""
        ...

    def round(self, report: RoundReport) -> None:
        """Note a round, thrown away or not; one that is told again replaces itself."""
        ...

    def rounds_told(self) -> Sequence[RoundReport]:
        """Return every round of the run, those of earlier attempts too, in order."""
        ...

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Add JSON-able facts by name; those of the same name are replaced."""
        ...

    def record(self, facts: Mapping[str, Any]) -> None:
        """Add JSON-able facts to the run's record (:mod:`atoll.server.record`).

        Mappings of the same name are merged, however deep; anything else is replaced.
        """
        ...


@dataclass
class MemoryRecorder:
    """Keeps what it hears."""

    stages: list[str] = field(default_factory=list)
    rounds: list[RoundReport] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> None:
        """Append the stage."""
        self.stages.append(name)

    def round(self, report: RoundReport) -> None:
        """Append the round, or put it where it was."""
        self.rounds = [one for one in self.rounds if one.round != report.round] + [report]

    def rounds_told(self) -> Sequence[RoundReport]:
        """Return the rounds by number."""
        return sorted(self.rounds, key=lambda report: report.round)

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Merge the facts."""
        self.facts.update(facts)

    def record(self, facts: Mapping[str, Any]) -> None:
        """Merge the facts."""
        self.recorded = merged(self.recorded, facts)


class SqlRecorder:
    """Writes a run's row and the rows of its rounds; ``clock`` gives Unix seconds."""

    def __init__(self, store: Store, run: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._run = run
        self._clock = clock

    def stage(self, name: str) -> None:
        """Show the stage."""
        with self._store.begin() as connection:
            connection.execute(update(runs).where(runs.c.id == self._run).values(stage=name))

    def round(self, report: RoundReport) -> None:
        """Add the round, or replace it.

        A round that was completed is progress: the run may be taken up as often again.
        """
        same = (rounds.c.run == self._run) & (rounds.c.round == report.round)
        with self._store.begin() as connection:
            connection.execute(delete(rounds).where(same))
            connection.execute(
                insert(rounds).values(
                    run=self._run,
                    round=report.round,
                    started_at=self._clock() - report.seconds - report.evaluate_seconds,
                    seconds=report.seconds,
                    survivors=list(report.survivors),
                    dropped=dict(report.dropped),
                    loss=report.loss,
                    epsilon=report.epsilon,
                    bytes_up=report.bytes_up,
                    bytes_down=report.bytes_down,
                    clip_norm=report.clip_norm,
                    drawn=report.drawn,
                    connected=report.connected,
                    lost=report.lost,
                    accuracy=report.accuracy,
                    evaluated=report.evaluated,
                    evaluate_seconds=report.evaluate_seconds,
                )
            )
            if report.survivors:
                connection.execute(update(runs).where(runs.c.id == self._run).values(stalled=0))

    def rounds_told(self) -> Sequence[RoundReport]:
        """Read the rounds back."""
        mine = select(rounds).where(rounds.c.run == self._run).order_by(rounds.c.round)
        with self._store.read() as connection:
            return [_report(row) for row in connection.execute(mine).mappings()]

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Merge the facts into the run's metrics."""
        mine = runs.c.id == self._run
        with self._store.begin() as connection:
            before = connection.execute(select(runs.c.metrics).where(mine)).scalar_one()
            connection.execute(update(runs).where(mine).values(metrics={**before, **facts}))

    def record(self, facts: Mapping[str, Any]) -> None:
        """Merge the facts into the run's record."""
        mine = runs.c.id == self._run
        with self._store.begin() as connection:
            before = connection.execute(select(runs.c.record).where(mine)).scalar_one()
            connection.execute(update(runs).where(mine).values(record=merged(before or {}, facts)))


def merged(before: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``before`` with ``facts`` over it; mappings on both sides are merged in turn."""
    both = {
        name: merged(before[name], value)
        for name, value in facts.items()
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping)
    }
    return {**before, **facts, **both}


def _report(row: RowMapping) -> RoundReport:
    """Return a stored round; what rows from before it was stored lack is zero."""
    return RoundReport(
        round=row["round"],
        seconds=row["seconds"],
        survivors=tuple(row["survivors"]),
        dropped=dict(row["dropped"]),
        loss=row["loss"],
        epsilon=row["epsilon"],
        bytes_up=row["bytes_up"] or 0,
        bytes_down=row["bytes_down"] or 0,
        clip_norm=row["clip_norm"] or 0.0,
        drawn=row["drawn"] or 0,
        connected=row["connected"] or 0,
        lost=row["lost"],
        accuracy=row["accuracy"],
        evaluated=row["evaluated"] or 0,
        evaluate_seconds=row["evaluate_seconds"] or 0.0,
    )
