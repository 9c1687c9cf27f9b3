"""The sum of terms as they arrive: one pass over each, two models of memory whatever the cohort.

A term stays in the narrow integers in which it travelled (:mod:`atoll.privacy.terms`). It is
looked at and added a stretch at a time, so that what the check has read is still in the
processor's cache when it is added. The sum is kept in 32 bits where it cannot leave them, which is
as wide as the model's own floats, and widened once, in place, when it is over.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from atoll.privacy.errors import Refused
from atoll.privacy.sums import Integers, SumSpec

_STRETCH: Final = 1 << 17
"""Values at a time: with their sum they take 1 MB of 32 bits, half of a core's own cache."""


class RunningTotal:
    """The sum of the terms of one ``spec``."""

    def __init__(self, spec: SumSpec) -> None:
        self._bound = spec.bound
        # Pages that nothing has been written to take no memory: the upper half of them comes to
        # be when the sum is widened.
        self._wide: Integers = np.zeros(spec.length, dtype=np.int64)
        self._sum: npt.NDArray[Any] = self._wide
        if spec.parties * spec.bound < 1 << 31:
            self._sum = self._wide.view(np.int32)[: spec.length]

    def add(self, term: npt.NDArray[Any]) -> None:
        """Add a term, signed integers ``(length,)`` no wider than the bound needs.

        Raises :class:`Refused` for one with a value outside the bound; nothing of it stays.
        """
        bound, highest = self._bound, np.iinfo(term.dtype).max
        for start in range(0, term.size, _STRETCH):
            part = term[start : start + _STRETCH]
            if np.minimum.reduce(part) < -bound or (
                highest > bound and np.maximum.reduce(part) > bound
            ):
                # Integers are exact, so what has been added can be taken away without a trace.
                before = self._sum[:start]
                np.subtract(before, term[:start], out=before)
                raise Refused(f"a term with a value outside ±{bound}")
            total = self._sum[start : start + _STRETCH]
            np.add(total, part, out=total)

    def values(self) -> Integers:
        """Return the sum, int64 ``(length,)``; nothing can be added any more."""
        narrow, self._sum = self._sum, self._wide
        if narrow.dtype != self._wide.dtype:
            # From the end, where a widened stretch covers only what has been read.
            for start in reversed(range(0, narrow.size, _STRETCH)):
                stretch = slice(start, start + _STRETCH)
                self._wide[stretch] = narrow[stretch].astype(np.int64)
        return self._wide
