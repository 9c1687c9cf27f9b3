"""The last state of a run on disk, so that a hub can stop at any instant and go on.

One file, replaced whole: written beside its place, flushed to the disk, renamed. A round
that has begun has been charged and may have been answered; what becomes of one that did not
end is for :mod:`atoll.federation.rounds` to say.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from atoll.federation.errors import BadCheckpoint
from atoll.federation.parameters import Vector

NAME: Final = "last.npz"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``weights`` float32 ``(n,)`` after the last completed round; ``begun`` ≥ ``completed``.

    ``moments`` are what the strategy carries on, float32 ``(n,)`` each, none before it stepped;
    ``tail`` float32 ``(n,)`` is the mean of the weights after the last ``tailed`` rounds, once
    they are averaged.
    Rounds count from 1; 0 means none. ``trained`` is how many rounds changed the weights;
    ``ended`` the last round that did not break off, thrown away or not; ``lost`` how many did
    break off and could not be repeated.
    ``session`` is what the hub's side of the sums keeps between rounds; nothing secret.
    ``clip_norm`` is the clipping norm to go on with; none before it was ever moved.
    ``counted`` is the last round of each device whose sum its term is in; ``control`` float32
    ``(n,)`` the hub's control variate, empty before there is one.
    ``turns`` counts by device how often it was asked, where the plan takes devices in turns,
    by a rule, or as they come.
    """

    run: str
    begun: int
    completed: int
    trained: int
    weights: Vector
    moments: tuple[Vector, ...]
    tail: Vector
    tailed: int = 0
    session: bytes = b""
    clip_norm: float | None = None
    ended: int = 0
    lost: int = 0
    counted: Mapping[str, int] = field(default_factory=dict)
    control: Vector = field(default_factory=lambda: np.zeros(0, np.float32))
    turns: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def fresh(cls, run: str, initial: Vector) -> "Checkpoint":
        """Return the state before the first round."""
        return cls(run, 0, 0, 0, initial, (), np.zeros_like(initial))

    @property
    def result(self) -> Vector:
        """The weights to go on with if the run ended now: float32 ``(n,)``."""
        return self.tail if self.tailed else self.weights


class Checkpoints:
    """The checkpoint of one run, in its directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace what is there; raises :class:`OSError` when the disk refuses."""
        body = io.BytesIO()
        np.savez(
            body,
            run=np.array(checkpoint.run),
            rounds=np.array(
                [checkpoint.begun, checkpoint.completed, checkpoint.trained, checkpoint.tailed],
                dtype=np.int64,
            ),
            broken_off=np.array([checkpoint.ended, checkpoint.lost], dtype=np.int64),
            weights=checkpoint.weights,
            # One array, of no row where nothing is remembered.
            moments=np.array(checkpoint.moments, np.float32).reshape(
                len(checkpoint.moments), len(checkpoint.weights)
            ),
            tail=checkpoint.tail,
            session=np.frombuffer(checkpoint.session, dtype=np.uint8),
            turns=np.frombuffer(json.dumps(dict(checkpoint.turns)).encode(), dtype=np.uint8),
            clip_norm=np.array(
                [] if checkpoint.clip_norm is None else [checkpoint.clip_norm], dtype=np.float64
            ),
            control=checkpoint.control,
            counted=np.frombuffer(msgspec.json.encode(checkpoint.counted), dtype=np.uint8),
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        try:
            with beside.open("wb") as file:
                file.write(body.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        finally:
            beside.unlink(missing_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load(self, run: str) -> Checkpoint | None:
        """Return the checkpoint of ``run``, or none.

        Raises :class:`BadCheckpoint` when the file is damaged or belongs to another run.
        """
        if not self._path.exists():
            return None
        try:
            with np.load(io.BytesIO(self._path.read_bytes()), allow_pickle=False) as file:
                begun, completed, trained, tailed = (int(value) for value in file["rounds"])
                # Files from before the norm could move hold none.
                norms = file["clip_norm"].tolist() if "clip_norm" in file.files else []
                # Those from before there were strategies hold FedAvg's one moment by its name.
                moments = file["moments"] if "moments" in file.files else [file["velocity"]]
                # And files from before rounds were repeated do not say how the last one went.
                ended, lost = file["broken_off"] if "broken_off" in file.files else (completed, 0)
                # Those from before devices carried anything do not say whose terms counted.
                told = file["counted"].tobytes() if "counted" in file.files else b"{}"
                control = file["control"] if "control" in file.files else np.zeros(0)
                turns = json.loads(file["turns"].tobytes()) if "turns" in file.files else {}
                found = Checkpoint(
                    run=str(file["run"]),
                    begun=begun,
                    completed=completed,
                    trained=trained,
                    weights=file["weights"].astype(np.float32),
                    moments=tuple(moment.astype(np.float32) for moment in moments),
                    tail=file["tail"].astype(np.float32),
                    tailed=tailed,
                    session=file["session"].tobytes(),
                    clip_norm=float(norms[0]) if norms else None,
                    ended=int(ended),
                    lost=int(lost),
                    control=control.astype(np.float32),
                    counted=msgspec.json.decode(told, type=dict[str, int]),
                    turns=turns,
                )
        except (
            TypeError,  # numpy reads a single array, too
            ValueError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
            msgspec.MsgspecError,
        ) as error:
            raise BadCheckpoint(
                f"{self._path} is damaged ({error}); remove it to begin the run again"
            ) from error
        if found.run != run:
            raise BadCheckpoint(
                f"{self._path} belongs to run {found.run!r}, not {run!r}; give another directory, "
                "or remove the file to begin this run"
            )
        return found
