"""How long a million draws of discrete Gaussian noise take, on one thread.

Peers: OpenDP's exact sampler where ``opendp`` is installed (it is asked for fewer draws, as it
takes a thousand times as long), and numpy's rounded normal, which is neither exact nor
unpredictable, as the speed that floats have.

``python -m benchmarks.noise [--json]``
"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from atoll.privacy import noise
from atoll.privacy.keystream import Keystream
from benchmarks.rows import Row, best_of, report

SIGMAS = (0.5, 3.0, 300.0, 11_585.0, 1e6)
DRAWS = 1_000_000
OPENDP_DRAWS = 5_000
REPEATS = 20
GOAL_MS = 100.0


def ours(sigma: float) -> float:
    """Return the milliseconds for a million draws under AES-256."""
    stream = Keystream.fresh()
    return 1e3 * best_of(lambda: noise.discrete_gaussian(sigma, DRAWS, stream), REPEATS)


def ours_at_first(sigma: float) -> float:
    """Return the milliseconds that the first draw of a σ takes, which builds the table."""
    stream = Keystream.fresh()
    fresh = iter(np.nextafter(sigma, np.inf) * (1 + 1e-9 * np.arange(5)))
    return 1e3 * best_of(lambda: noise.discrete_gaussian(float(next(fresh)), 1, stream))


def numpy_rounded(sigma: float) -> float:
    """Return the milliseconds for a million rounded floats."""
    rng = np.random.default_rng(0)
    return 1e3 * best_of(lambda: np.rint(rng.normal(0.0, sigma, DRAWS)).astype(np.int64), REPEATS)


def opendp(sigma: float) -> float:
    """Return the milliseconds for a million draws, reckoned from fewer."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    mechanism = dp.m.make_gaussian(*space, scale=sigma)
    zeros = [0] * OPENDP_DRAWS
    return 1e3 * best_of(lambda: mechanism(zeros), repeats=3) * DRAWS / OPENDP_DRAWS


def rows() -> list[Row]:
    """Measure every σ beside every peer there is."""
    peers: dict[str, Callable[[float], float]] = {"numpy, rounded": numpy_rounded}
    if find_spec("opendp"):
        peers["OpenDP"] = opendp
    measured = []
    for sigma in SIGMAS:
        mine = ours(sigma)
        for name, peer in peers.items():
            theirs = peer(sigma)
            measured.append(
                Row(
                    case=f"σ = {sigma:g}",
                    metric="a million draws",
                    unit="ms",
                    ours=mine,
                    peer=theirs,
                    peer_name=name,
                    ratio=theirs / mine,
                    goal=GOAL_MS,
                    met=mine <= GOAL_MS,
                )
            )
        measured.append(
            Row(case=f"σ = {sigma:g}", metric="first draw", unit="ms", ours=ours_at_first(sigma))
        )
    return measured


def main() -> int:
    """Print the rows; return 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    return report(rows(), parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
