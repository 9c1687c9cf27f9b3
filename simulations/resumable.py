"""A simulation on disk after each of its rounds, so that it can break off and go on.

A directory holds one simulation: its last state (:mod:`atoll.federation.checkpoints`), a line
of JSON for each of its rounds, and what devices carry from round to round, if they do. The
state is written last; what is past it is of a round that will be done again, and is dropped.

What comes out is what would have come out (:func:`simulate.run` says why), but for one thing: how
many rounds in a row were thrown away is counted anew.

What goes on must be what began: the state carries a digest of the plan, of how many devices
there are and of the cohort.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from atoll.federation.checkpoints import Checkpoint, Checkpoints
from atoll.federation.errors import BadCheckpoint
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.simulations import simulate
from atoll.simulations.populations import Simulated
from atoll.simulations.simulate import RUN, Ended, Round

ROUNDS: Final = "rounds.jsonl"


def run(
    plan: Plan,
    simulated: Simulated,
    cohort: int | None,
    on_round: Callable[[Round], None],
    *,
    directory: Path | None,
    workers: int = 1,
) -> tuple[Ended, list[Round]]:
    """Run the simulation from where it stands in ``directory``; return all of its rounds as well.

    None keeps nothing. ``on_round`` hears of the rounds that are run now; ``workers``
    train at once. Raises what
    :func:`simulate.run` does, and :class:`BadCheckpoint`.
    """
    there = directory and Resumable(directory, plan, simulated.population.size, cohort)
    heard = list(there.rounds) if there else []

    def tell(done: Round) -> None:
        heard.append(done)
        on_round(done)

    ended = simulate.run(
        plan,
        simulated,
        cohort,
        tell,
        start=there.start if there else None,
        carried=there.carried if there else None,
        keep=there.keep if there else None,
        workers=workers,
    )
    return ended, heard


class Resumable:
    """The simulation in ``directory``, begun or not.

    ``start`` is the state to go on from, none where nothing is yet; ``rounds`` are those that
    are in it, ``carried`` what devices carry by then: float32 ``(n,)`` by device.
    Raises :class:`BadCheckpoint` when the directory holds another simulation.
    """

    def __init__(self, directory: Path, plan: Plan, devices: int, cohort: int | None) -> None:
        self._run, self._directory = identity(plan, devices, cohort), directory
        self._checkpoints, self._lines = Checkpoints(directory), directory / ROUNDS
        found = self._checkpoints.load(self._run)
        ended = 0 if found is None else found.ended
        self.start = None if found is None else replace(found, run=RUN)
        self.rounds = self._read(ended)
        self.carried = self._load(ended)

    def keep(self, state: Checkpoint, done: Round) -> None:
        """Write a round, and the state after it."""
        self.rounds.append(done)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done), allow_nan=False) + "\n")
        if self.carried:
            names = {str(device): vector for device, vector in self.carried.items()}
            np.savez(self._carried(done.round), allow_pickle=False, **names)
        self._checkpoints.save(replace(state, run=self._run))
        self._carried(done.round - 1).unlink(missing_ok=True)

    def _carried(self, number: int) -> Path:
        return self._directory / f"carried-{number}.npz"

    def _load(self, ended: int) -> dict[int, Vector]:
        path = self._carried(ended)
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as file:
            return {int(name): file[name] for name in file.files}

    def _read(self, ended: int) -> list[Round]:
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        text = self._lines.read_text(encoding="utf-8") if self._lines.exists() else ""
        # A line that ends without a newline broke off; it is past the state.
        whole = text.splitlines()[: text.count("\n")][:ended]
        try:
            rounds = [msgspec.json.decode(line, type=Round) for line in whole]
        except msgspec.DecodeError as error:
            raise BadCheckpoint(f"{self._lines} is damaged: {error}") from error
        if len(rounds) != ended:
            raise BadCheckpoint(
                f"{self._lines} tells of {len(rounds)} rounds and the state beside it of {ended}; "
                "remove the directory to begin again"
            )
        if text != (in_it := "".join(line + "\n" for line in whole)):
            self._lines.write_text(in_it, encoding="utf-8")
        return rounds


def identity(plan: Plan, devices: int, cohort: int | None) -> str:
    """Return a name that two simulations have in common when they are the same."""
    said = json.dumps([_said(plan), devices, cohort], sort_keys=True)
    return f"{plan.name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _said(part: msgspec.Struct) -> Mapping[str, Any]:
    """Return what a plan says beyond the defaults, which grow with the program."""
    said = {}
    for field in msgspec.structs.fields(part):
        value = getattr(part, field.name)
        if field.name == "evaluate_every":
            continue  # looking changes nothing
        if isinstance(value, msgspec.Struct):
            said[field.name] = _said(value)
        elif value != field.default:
            said[field.name] = value
    return {name: value for name, value in said.items() if value != {}}
