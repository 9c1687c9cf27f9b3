"""What a run tells about itself while it goes on: stages, rounds, and what was measured.

:class:`Recorder` is the seam; :class:`SqlRecorder` writes the hub's tables, which API and
dashboard read, and :class:`MemoryRecorder` keeps everything for tests and simulations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import delete, insert, select, update

from atoll.federation.conversation import RoundReport
from atoll.server.schema import rounds, runs
from atoll.server.store import Store


class Recorder(Protocol):
    """Hears what a run does, as it does it."""

    def stage(self, name: str) -> None:
        """Note that the run has come to the stage ``name``."""
        ...

    def round(self, report: RoundReport) -> None:
        """Note a round, thrown away or not."""
        ...

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Add JSON-able facts by name; those of the same name are replaced."""
        ...


@dataclass
class MemoryRecorder:
    """Keeps what it hears."""

    stages: list[str] = field(default_factory=list)
    rounds: list[RoundReport] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> None:
        """Append the stage."""
        self.stages.append(name)

    def round(self, report: RoundReport) -> None:
        """Append the round."""
        self.rounds.append(report)

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Merge the facts."""
        self.facts.update(facts)


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
        """Add the round; one that a restarted run reports again replaces itself.

        A round that was completed is progress: the run may be taken up as often again.
        """
        same = (rounds.c.run == self._run) & (rounds.c.round == report.round)
        with self._store.begin() as connection:
            connection.execute(delete(rounds).where(same))
            connection.execute(
                insert(rounds).values(
                    run=self._run,
                    round=report.round,
                    started_at=self._clock() - report.seconds,
                    seconds=report.seconds,
                    survivors=list(report.survivors),
                    dropped=dict(report.dropped),
                    loss=report.loss,
                    epsilon=report.epsilon,
                )
            )
            if report.survivors:
                connection.execute(update(runs).where(runs.c.id == self._run).values(stalled=0))

    def metrics(self, facts: Mapping[str, Any]) -> None:
        """Merge the facts into the run's metrics."""
        mine = runs.c.id == self._run
        with self._store.begin() as connection:
            before = connection.execute(select(runs.c.metrics).where(mine)).scalar_one()
            connection.execute(update(runs).where(mine).values(metrics={**before, **facts}))
