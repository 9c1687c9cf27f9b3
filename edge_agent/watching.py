"""Counting what a device serves, never keeping it.

Each answered request is counted into the bins of the release's reference profile and
forgotten. A window of counts closes after so many rows or seconds, when the release changes
and when the process ends, and goes into the outbox. No input and no output is ever stored or
sent.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from atoll.fleet import profile as profiles
from atoll.fleet.bundle import PROFILE
from atoll.fleet.errors import BadBundle
from atoll.fleet.profile import Profile
from atoll.fleet.wire import Window

LATENCIES: Final = 512


def load_profile(directory: Path) -> Profile:
    """Read a bundle's reference profile; raise :class:`BadProfile` or :class:`BadBundle`."""
    try:
        return Profile.decode((directory / PROFILE).read_bytes())
    except OSError as error:
        raise BadBundle(f"cannot read {PROFILE}: {error.strerror}") from error


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Return probabilities over the last axis, float64; rows with NaN or +Inf become NaN."""
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        values = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(values / values.sum(axis=-1, keepdims=True))


class Watch:
    """The open window of one release; safe to call from several threads."""

    def __init__(
        self,
        model: str,
        release: int,
        profile: Profile,
        emit: Callable[[Window], object],
        clock: Callable[[], float],
        rows: int,
        seconds: float,
    ) -> None:
        self._model, self._release, self._profile = model, release, profile
        self._emit, self._clock = emit, clock
        self._limit_rows, self._limit_seconds = rows, seconds
        self._lock = threading.Lock()
        self._counts: dict[str, profiles.Counts] = {}
        self._rows = 0
        self._start = 0.0

    def saw(self, inputs: npt.NDArray[np.float32], logits: npt.NDArray[np.floating]) -> None:
        """Count served examples ``(n, *shape)`` and their outputs ``(n, classes)``.

        Raises :class:`atoll.fleet.errors.BadProfile` when they do not fit the profile.
        """
        found = profiles.features(self._profile.features, inputs)
        counts = profiles.count(self._profile, found, softmax(logits))
        with self._lock:
            if not self._rows:
                self._start = self._clock()
            self._counts = profiles.merge(self._counts, counts) if self._rows else counts
            self._rows += len(inputs)
            window = self._close() if self._rows >= self._limit_rows else None
        self._send(window)

    def tick(self) -> None:
        """Close the window if its time is over."""
        with self._lock:
            due = self._rows and self._clock() - self._start >= self._limit_seconds
            window = self._close() if due else None
        self._send(window)

    def flush(self) -> None:
        """Close the window now."""
        with self._lock:
            window = self._close() if self._rows else None
        self._send(window)

    def _close(self) -> Window:
        window = Window(
            model=self._model,
            release=self._release,
            start=self._start,
            end=self._clock(),
            rows=self._rows,
            counts=profiles.pack_all(self._counts),
        )
        self._counts, self._rows = {}, 0
        return window

    def _send(self, window: Window | None) -> None:
        if window is not None:
            self._emit(window)


class Latencies:
    """The last few hundred request times, in milliseconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = np.zeros(LATENCIES)
        self._seen = 0

    def add(self, milliseconds: float) -> None:
        """Note one request."""
        with self._lock:
            self._values[self._seen % LATENCIES] = milliseconds
            self._seen += 1

    def quantiles(self) -> tuple[float, float] | None:
        """Return the median and the 95th percentile, or none before the first request."""
        with self._lock:
            values = self._values[: min(self._seen, LATENCIES)].copy()
        if not values.size:
            return None
        p50, p95 = np.quantile(values, [0.5, 0.95])
        return float(p50), float(p95)
