"""A cohort's parts trained on a machine's cores at once: processes forked from this one.

    with Workers(work, length, count) as workers:
        total, said = workers.sum(order, parts)

``work(order, part, total)`` adds what the devices of a part come to into int64 ``(length,)`` and
returns what there is to say of them. Each worker adds into a sum of its own, in memory that it
shares with this process, so that a round carries two vectors and not one for each device. Sums of
integers do not depend on their order, and parts do not depend on how many workers there are: so
the result does not either.

Processes and not threads, because a network that draws at random draws from torch's one
generator. Forked, because they then have the population and the network without being sent them.
One thread each: one that trains a device alone wastes no time on waiting for another, and
torch's threads do not outlive a fork. With one worker, or where there is no fork, this process
does it all.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Final, Generic, TypeVar

import numpy as np
import torch

from atoll.federation.errors import RoundFailed
from atoll.privacy.sums import Integers
from atoll.simulations import memory

Order = TypeVar("Order")
Said = TypeVar("Said")

_BYTES: Final = 8
_TRIM, _MAP = -1, -3
_KEPT: Final = 1 << 25
"""Largest block, in bytes, that a worker's allocator may keep: glibc's own maximum."""


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


class Workers(Generic[Order, Said]):
    """``count`` processes that ``work``; they end with the block."""

    def __init__(
        self, work: Callable[[Order, Sequence[int], Integers], Said], length: int, count: int
    ) -> None:
        self._work, self._length = work, length
        self._count = count if sys.platform == "linux" else 1
        self._processes: list[BaseProcess] = []
        self._lines: list[Connection] = []
        self._sums: list[Integers] = []

    def __enter__(self) -> "Workers[Order, Said]":
        if self._count > 1:
            context = multiprocessing.get_context("fork")
            for _ in range(self._count):
                shared = mmap.mmap(-1, max(self._length, 1) * _BYTES)
                mine, its = context.Pipe()
                total = np.frombuffer(shared, np.int64, self._length)
                self._lines.append(mine)
                self._sums.append(total)
                process = context.Process(target=self._serve, args=(its, total), daemon=True)
                process.start()
                its.close()
                self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # it holds nothing, and may be in the middle of a part
            process.join()
        for line in self._lines:
            line.close()
        self._processes, self._lines, self._sums = [], [], []

    def peak(self) -> int:
        """Return the bytes that the processes took at most besides what they share with this one.

        Each one's own peak (:func:`atoll.simulations.memory.own_peak`), added up as if they had
        come at one time. 0 when this process does it all.
        """
        pids = (process.pid for process in self._processes)
        return sum(memory.own_peak(pid) for pid in pids if pid is not None)

    def sum(self, order: Order, parts: Iterable[Sequence[int]]) -> tuple[Integers, list[Said]]:
        """Return the sum over all ``parts``, and what ``work`` said of each, in their order.

        Raises what ``work`` raises, and :class:`RoundFailed` when a worker was killed.
        """
        waiting = list(parts)
        total: Integers = np.zeros(self._length, np.int64)
        if not self._lines:
            with _one_thread():
                return total, [self._work(order, part, total) for part in waiting]
        try:
            said = self._share_out(order, waiting)
        except (EOFError, OSError) as error:
            raise RoundFailed(
                "a worker process was killed; with fewer --threads there is more memory for each"
            ) from error
        for part_sum in self._sums:
            total += part_sum
        return total, said

    def _share_out(self, order: Order, parts: Sequence[Sequence[int]]) -> list[Said]:
        """Give each worker a part whenever it has none; return what they said, in order."""
        for line in self._lines:
            line.send(order)
        said: dict[int, Said] = {}
        failed: list[Exception] = []
        idle, busy, begun = list(self._lines), dict[Connection, int](), 0
        while busy or (begun < len(parts) and not failed):
            while idle and begun < len(parts) and not failed:
                line = idle.pop()
                line.send(parts[begun])
                busy[line], begun = begun, begun + 1
            ready = wait(list(busy))
            for line in [line for line in busy if line in ready]:
                answer = line.recv()
                if isinstance(answer, Exception):
                    failed.append(answer)
                else:
                    said[busy[line]] = answer
                del busy[line]
                idle.append(line)
        for line in self._lines:
            line.send(None)
        if failed:
            raise failed[0]
        return [said[place] for place in range(len(parts))]

    def _serve(self, line: Connection, total: Integers) -> None:
        """Take an order and its parts, and the next, until nobody is at the other end."""
        for inherited in self._lines:
            inherited.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that forked hears of it too
        torch.set_num_threads(1)
        _keep_memory()
        with suppress(EOFError, OSError):
            while True:
                order = line.recv()
                total[:] = 0
                while (part := line.recv()) is not None:
                    try:
                        line.send(self._work(order, part, total))
                    except Exception as error:  # noqa: BLE001 -- raised again on the other side
                        line.send(error)


def _keep_memory() -> None:
    """Keep what is freed, if the C library is glibc.

    It would go back to the system after each step, and come again page by page: 1,600 faults
    in each for a network of 1.6 million weights.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_MAP, _KEPT)
        library.mallopt(_TRIM, 2**31 - 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
