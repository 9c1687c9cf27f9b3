"""Live traffic for simulated devices: each one's own held-back windows, to its own port.

Stands where a device's sensor driver would: it speaks the Open Inference Protocol v2 to the
agent on the same machine and to nobody else. :func:`turned` is the fault that the demo makes,
a watch worn the wrong way round.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import httpx
import numpy as np
import numpy.typing as npt

from atoll.federation.task import Examples

Windows = npt.NDArray[np.float32]

BATCH: Final = 8
TIMEOUT_SECONDS: Final = 30.0


class TrafficFailed(Exception):
    """A device did not answer inference requests as it should."""


@dataclass(frozen=True, slots=True)
class Served:
    """What came of the windows fed to one device: ``rows`` answered, ``correct`` of them."""

    rows: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of rows answered correctly; NaN when there were none."""
        return self.correct / self.rows if self.rows else float("nan")


def shuffled_halves(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split examples in two halves at random, so that both hold every class alike."""
    order = np.random.default_rng(seed).permutation(len(examples.y))
    half = len(order) // 2
    first, second = order[:half], order[half:]
    return (
        Examples(examples.x[first], examples.y[first]),
        Examples(examples.x[second], examples.y[second]),
    )


def turned(x: Windows) -> Windows:
    """Return windows ``(n, 6, t)`` as a watch turned half round about the wrist's normal sees them.

    A half turn about the z axis negates x and y of the accelerometer and of the gyroscope.
    """
    signs = np.array([-1, -1, 1, -1, -1, 1], dtype=np.float32)
    return x * signs[:, None]


def feed(url: str, model: str, examples: Examples) -> Served:
    """Send every example to the device at ``url`` and count the right answers.

    Raises :class:`TrafficFailed` when the device refuses or cannot be reached.
    """
    correct = 0
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        for start in range(0, len(examples.y), BATCH):
            x = examples.x[start : start + BATCH]
            request = {
                "inputs": [
                    {
                        "name": "input",
                        "shape": list(x.shape),
                        "datatype": "FP32",
                        "data": x.ravel().tolist(),
                    }
                ]
            }
            try:
                reply = client.post(f"/v2/models/{model}/infer", json=request)
                reply.raise_for_status()
                output = reply.json()["outputs"][0]
            except httpx.HTTPStatusError as error:
                raise TrafficFailed(f"{url}: {error.response.text}") from error
            except httpx.HTTPError as error:
                raise TrafficFailed(f"{url}: {error}") from error
            scores = np.asarray(output["data"], dtype=np.float64).reshape(output["shape"])
            correct += int((scores.argmax(axis=1) == examples.y[start : start + BATCH]).sum())
    return Served(len(examples.y), correct)


def feed_all(
    urls: Mapping[str, str],
    model: str,
    examples: Mapping[str, Examples],
    done: Callable[[str, Served], None] = lambda _device, _served: None,
) -> dict[str, Served]:
    """Feed several devices side by side; ``done`` is called as each one ends."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {
            device: pool.submit(feed, urls[device], model, rows)
            for device, rows in examples.items()
        }
        served = {}
        for device, future in futures.items():
            served[device] = future.result()
            done(device, served[device])
    return served
