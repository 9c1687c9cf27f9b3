"""A simulation on disk after each of its rounds, so that it can break off and go on.

A directory holds one simulation: what it is of (:mod:`atoll.simulations.identity`), its last state
(:mod:`atoll.federation.checkpoints`), a line of JSON for each of its rounds, and what devices carry
from round to round, if they do. The state is written last; what is past it is of a round that
will be done again, and is dropped.

What comes out is what would have come out (:func:`simulate.run` says why), but for one thing: how
many rounds in a row were thrown away is counted anew.

What goes on must be what began, and a directory that holds anything else is left as it is.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from atoll.federation.checkpoints import NAME, Checkpoint, Checkpoints
from atoll.federation.errors import BadCheckpoint
from atoll.federation.parameters import Vector
from atoll.federation.plan import Plan
from atoll.simulations import identity, simulate
from atoll.simulations.identity import Identity
from atoll.simulations.populations import Simulated
from atoll.simulations.simulate import RUN, Ended, Round

ROUNDS: Final = "rounds.jsonl"
OF: Final = "simulation.json"
"""In this file a directory says what it holds a simulation of."""
_PART: Final = ".part"
"""Of files that are renamed once they are whole."""
_ANEW: Final = "give another directory, or remove this one to begin again"


def run(
    plan: Plan,
    simulated: Simulated,
    cohort: int | None,
    on_round: Callable[[Round], None],
    *,
    kept: "Resumable | None",
    workers: int = 1,
) -> tuple[Ended, list[Round]]:
    """Run the simulation from where it stands in ``kept``; return all of its rounds as well.

    None keeps nothing. ``on_round`` hears of the rounds that are run now; ``workers``
    train at once. Raises what :func:`simulate.run` does.
    """
    heard = list(kept.rounds) if kept else []

    def tell(done: Round) -> None:
        heard.append(done)
        on_round(done)

    ended = simulate.run(
        plan,
        simulated,
        cohort,
        tell,
        start=kept.start if kept else None,
        carried=kept.carried if kept else None,
        keep=kept.keep if kept else None,
        workers=workers,
    )
    return ended, heard


def opened(
    directory: Path | None, plan: Plan, simulated: Simulated, cohort: int | None
) -> "Resumable | None":
    """Return the simulation in ``directory``; none where it is not to be kept."""
    return None if directory is None else Resumable(directory, plan, simulated, cohort)


class Resumable:
    """The simulation in ``directory``, begun or not.

    ``start`` is the state to go on from, none where nothing is yet; ``rounds`` are those that
    are in it, ``carried`` what devices carry by then: float32 ``(n,)`` by device.
    Raises :class:`BadCheckpoint` when the directory holds another simulation, or something else.
    """

    def __init__(
        self, directory: Path, plan: Plan, simulated: Simulated, cohort: int | None
    ) -> None:
        self._of, self._directory = identity.of(plan, simulated.population, cohort), directory
        self._checkpoints, self._lines = Checkpoints(directory), directory / ROUNDS
        self._open()
        self._said = self._check()
        found = self._checkpoints.load(self._of.run)
        ended = 0 if found is None else found.ended
        self.start = None if found is None else replace(found, run=RUN)
        carries = plan.training.control_steps is not None and found is not None and found.trained
        self.carried = self._load(ended) if carries else {}
        self.rounds = self._read(ended)

    def keep(self, state: Checkpoint, done: Round) -> None:
        """Write a round, and the state after it."""
        self.rounds.append(done)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(done), allow_nan=False) + "\n")
        if self.carried:
            names = {str(device): vector for device, vector in self.carried.items()}
            np.savez(self._carried(done.round), allow_pickle=False, **names)
        if not self._said:
            beside = (self._directory / OF).with_suffix(_PART)
            beside.write_bytes(msgspec.json.format(msgspec.json.encode(self._of)))
            beside.replace(self._directory / OF)
            self._said = True
        self._checkpoints.save(replace(state, run=self._of.run))
        self._carried(done.round - 1).unlink(missing_ok=True)

    def _open(self) -> None:
        """Make the directory, or see that what is in it is a simulation's."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadCheckpoint(
                f"{self._directory} is a file, or below one, and a simulation is kept in a "
                "directory: give one that is new or empty"
            ) from error
        names = sorted(path.name for path in self._directory.iterdir())
        foreign = [name for name in names if not _ours(name)]
        if foreign and NAME not in names:
            raise BadCheckpoint(
                f"{self._directory} holds no simulation, but {foreign[0]!r}"
                f"{' and more' if len(foreign) > 1 else ''}: give a directory that is new or empty"
            )
        if NAME in names and ROUNDS not in names:
            raise BadCheckpoint(
                f"{self._directory} holds a state without {ROUNDS}, so none of a simulation: give "
                "a directory that is new or empty"
            )

    def _check(self) -> bool:
        """Refuse another simulation; return whether the directory says what it is of."""
        path = self._directory / OF
        if not (path.exists() and (self._directory / NAME).exists()):
            return False
        try:
            there = msgspec.json.decode(path.read_bytes(), type=Identity)
        except msgspec.MsgspecError as error:
            raise BadCheckpoint(f"{path} is damaged ({error}); {_ANEW}") from error
        if differences := identity.differences(there, self._of):
            raise BadCheckpoint(
                f"{self._directory} holds another simulation ({differences}); give another "
                "directory, or run what this one holds to go on with it"
            )
        return True

    def _carried(self, number: int) -> Path:
        return self._directory / f"carried-{number}.npz"

    def _load(self, ended: int) -> dict[int, Vector]:
        path = self._carried(ended)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {int(name): file[name] for name in file.files}
        except (FileNotFoundError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BadCheckpoint(f"{path} is gone or damaged ({error}); {_ANEW}") from error

    def _read(self, ended: int) -> list[Round]:
        """Return the rounds that are in the state, and drop the lines that are past it."""
        try:
            text = self._lines.read_text(encoding="utf-8") if self._lines.exists() else ""
            # A line that ends without a newline broke off; it is past the state.
            lines = text.splitlines()[: text.count("\n")]
            rounds = [msgspec.json.decode(line, type=Round) for line in lines[:ended]]
        except (UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise BadCheckpoint(f"{self._lines} is damaged ({error}); {_ANEW}") from error
        if not ended <= len(lines) <= ended + 1:
            raise BadCheckpoint(
                f"{self._lines} tells of {len(lines)} rounds and the state beside it of {ended}; "
                f"{_ANEW}"
            )
        if text != (in_it := "".join(line + "\n" for line in lines[:ended])):
            self._lines.write_text(in_it, encoding="utf-8")
        return rounds


def _ours(name: str) -> bool:
    """Whether a simulation may have written a file of this name; hidden ones are nobody's."""
    path = Path(name)
    return (
        name in (NAME, ROUNDS, OF)
        or name in (str(Path(whole).with_suffix(_PART)) for whole in (NAME, OF))
        or name.startswith(".")
        or (path.stem.startswith("carried-") and path.suffix == ".npz")
    )
