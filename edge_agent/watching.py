"""Counting what a device serves, never keeping it.

Each answered request is counted into the bins of the release's reference profile and
forgotten. A window of counts closes after so many rows or seconds, when the release changes
and when the process ends, and goes into the outbox. No input and no output is ever stored or
sent.

**Noise.** Where the signed manifest asks for it, discrete Gaussian noise is added to every
count on the way out, once per window: it is the noised window that waits in the outbox, is sent
and is sent again. Counts without noise never leave this process's memory. Neighbouring windows
differ in one served row being another (how many rows there are is public), which takes one
from a bin and adds one to another in each of V variables: √(2V) in L2. Each row lies in one
window alone, so however many windows there are, it pays for one release of noise.
"""

import threading
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from atoll.fleet import profile as profiles
from atoll.fleet.bundle import PROFILE
from atoll.fleet.counts import Counts, pack_all, pack_all_signed
from atoll.fleet.errors import BadBundle
from atoll.fleet.profile import Profile
from atoll.fleet.wire import Window

if TYPE_CHECKING:
    from atoll.privacy.keystream import Keystream

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


class Packed(NamedTuple):
    """Counts as they leave the device, with noise of σ = ``noise`` on each."""

    counts: dict[str, bytes]
    noise: float


Pack = Callable[[Mapping[str, Counts]], Packed]


def exactly(counts: Mapping[str, Counts]) -> Packed:
    """Pack counts as they are."""
    return Packed(pack_all(counts), 0.0)


class Noised:
    """Packs counts with noise of ``multiplier`` times what one row changes them by.

    ``stream`` gives a new keystream for each window. Raises :class:`BadBundle` when noise so
    large cannot be drawn.
    """

    def __init__(
        self, multiplier: float, variables: int, stream: "Callable[[], Keystream]"
    ) -> None:
        # With privacy.noise comes cryptography: megabytes, for releases that ask for noise alone.
        from atoll.privacy.errors import BadParameters
        from atoll.privacy.noise import check, discrete_gaussian

        self._draw, self._stream = discrete_gaussian, stream
        self.sigma = multiplier * sqrt(2 * variables)
        try:
            check(self.sigma)
        except BadParameters as error:
            raise BadBundle(
                f"the release asks for noise that this device lacks: {error}"
            ) from error

    def __call__(self, counts: Mapping[str, Counts]) -> Packed:
        """Draw the noise of one window and add it."""
        noise = self._draw(self.sigma, sum(map(len, counts.values())), self._stream())
        ends = np.cumsum([len(vector) for vector in counts.values()])[:-1]
        parts = zip(counts.items(), np.split(noise, ends), strict=True)
        return Packed(
            pack_all_signed({name: vector + part for (name, vector), part in parts}), self.sigma
        )


def packing(telemetry_noise: float, profile: Profile) -> Pack:
    """Return how the counts of a release leave the device, by its signed manifest."""
    if not telemetry_noise:
        return exactly
    from atoll.privacy.keystream import Keystream

    return Noised(telemetry_noise, len(profile.variables), Keystream.fresh)


class _Closed(NamedTuple):
    """A window's counts, exact and packed by nobody yet."""

    start: float
    end: float
    rows: int
    counts: Mapping[str, Counts]


class Watch:
    """The open window of one release; safe to call from several threads."""

    def __init__(
        self,
        model: str,
        release: int,
        profile: Profile,
        pack: Pack,
        emit: Callable[[Window], object],
        clock: Callable[[], float],
        rows: int,
        seconds: float,
    ) -> None:
        self._model, self._release, self._profile = model, release, profile
        self._pack, self._emit, self._clock = pack, emit, clock
        self._limit_rows, self._limit_seconds = rows, seconds
        self._lock = threading.Lock()
        self._counts: dict[str, Counts] = {}
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

    def _close(self) -> _Closed:
        closed = _Closed(self._start, self._clock(), self._rows, self._counts)
        self._counts, self._rows = {}, 0
        return closed

    def _send(self, closed: _Closed | None) -> None:
        if closed is None:
            return
        packed = self._pack(closed.counts)
        self._emit(
            Window(
                model=self._model,
                release=self._release,
                start=closed.start,
                end=closed.end,
                rows=closed.rows,
                counts=packed.counts,
                noise=packed.noise,
            )
        )


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
