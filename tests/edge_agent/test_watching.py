"""What leaves a device of the counts of what it served, and what the noise on it is."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from atoll.edge_agent.database import Database
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.watching import Noised, Watch, exactly, packing, softmax
from atoll.fleet import profile as profiles
from atoll.fleet import wire
from atoll.fleet.counts import unpack_all, unpack_all_signed
from atoll.fleet.errors import BadBundle
from atoll.privacy.keystream import Keystream

SPEC = profiles.FeatureSpec(kind="channel-stats", channels=("ax", "ay"))
EDGES = dict.fromkeys(SPEC.names, tuple(np.linspace(-1, 1, 31).tolist()))
PROFILE = profiles.build(SPEC, EDGES, ("still", "walk", "run"))
VARIABLES = len(PROFILE.variables)
Z = 0.75


class Streams:
    """Keystreams that can be replayed, another one each time."""

    def __init__(self) -> None:
        self.given = 0

    def __call__(self) -> Keystream:
        self.given += 1
        return Keystream.replayable(self.given)


def served(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2, 8)).astype(np.float32), rng.normal(size=(n, 3))


def counted(x: np.ndarray, logits: np.ndarray) -> dict[str, np.ndarray]:
    return profiles.count(PROFILE, profiles.features(SPEC, x), softmax(logits))


def windows(pack, number: int, rows: int = 40) -> list[wire.Window]:
    """Return the windows of ``number`` times ``rows`` rows, each as :func:`served` by number."""
    sent: list[wire.Window] = []
    watch = Watch("gait", 3, PROFILE, pack, sent.append, lambda: 5.0, rows, 60.0)
    for seed in range(number):
        watch.saw(*served(rows, seed))
    watch.flush()
    return sent


def test_without_noise_the_counts_leave_as_they_are() -> None:
    assert packing(0.0, PROFILE) is exactly
    [window] = windows(exactly, 1)
    assert window.noise == 0
    found = unpack_all(window.counts, PROFILE.bins)
    for name, counts in counted(*served(40, 0)).items():
        np.testing.assert_array_equal(found[name], counts)


def test_the_noise_is_gaussian_with_the_sigma_that_the_window_names() -> None:
    sent = windows(Noised(Z, VARIABLES, Streams()), 300)
    errors = []
    for seed, window in enumerate(sent):
        exact = counted(*served(40, seed))
        found = unpack_all_signed(window.counts, PROFILE.bins)
        errors += [found[name] - exact[name] for name in exact]
    noise = np.concatenate(errors)
    # One row moves one count down and one up in each variable: √(2V) in L2.
    sigma = Z * sqrt(2 * VARIABLES)
    assert {window.noise for window in sent} == {sent[0].noise}
    assert sigma <= sent[0].noise <= sigma * 1.002
    # Σ(e/σ)² is chi-square with one degree each, about normal with variance 2N; 5 deviations.
    assert noise.size > 40_000
    statistic = float(np.sum((noise / sent[0].noise) ** 2))
    assert abs(statistic - noise.size) < 5 * sqrt(2 * noise.size)
    assert abs(float(noise.mean())) < 5 * sigma / sqrt(noise.size)
    assert noise.min() < -2 * sigma  # nothing is clamped
    pairs = np.stack([np.concatenate(errors[i :: len(exact)]) for i in (0, 1)])
    assert abs(np.corrcoef(pairs)[0, 1]) < 5 / sqrt(pairs.shape[1])


def test_each_window_has_noise_of_its_own() -> None:
    streams = Streams()
    watched: list[wire.Window] = []
    pack = Noised(Z, VARIABLES, streams)
    watch = Watch("gait", 3, PROFILE, pack, watched.append, lambda: 5.0, 40, 60.0)
    for _ in range(2):
        watch.saw(*served(40, 1))
    assert streams.given == len(watched) == 2
    assert watched[0].counts != watched[1].counts


def test_keys_of_a_device_cannot_be_foretold() -> None:
    pack = packing(Z, PROFILE)
    exact = counted(*served(40, 1))
    assert pack(exact).counts != pack(exact).counts


def test_a_window_is_noised_once_and_sent_again_byte_by_byte(tmp_path: Path) -> None:
    database = Database(tmp_path / "agent.db")
    box = Outbox(database)
    box.start_boot()
    streams = Streams()
    pack = Noised(Z, VARIABLES, streams)
    watch = Watch(
        "gait", 3, PROFILE, pack, lambda window: box.enqueue(window, 1.0), lambda: 5.0, 40, 60.0
    )
    watch.saw(*served(40, 1))
    [first] = box.waiting(9)
    assert box.waiting(9) == [first]  # not acknowledged: it is sent again
    database.close()

    again = Database(tmp_path / "agent.db")
    assert Outbox(again).waiting(9) == [first]
    again.close()
    assert streams.given == 1


def stored(directory: Path, pack) -> bytes:
    """Return what is on disk after a window went into the outbox."""
    directory.mkdir()
    database = Database(directory / "agent.db")
    box = Outbox(database)
    box.start_boot()
    for window in windows(pack, 1):
        box.enqueue(window, 1.0)
    database.close()
    return b"".join(path.read_bytes() for path in directory.glob("agent.db*"))


def test_where_there_is_noise_no_exact_count_is_ever_written_down(tmp_path: Path) -> None:
    open_counts = stored(tmp_path / "exact", exactly)
    noised = stored(tmp_path / "noised", Noised(4.0, VARIABLES, Streams()))
    for packed in exactly(counted(*served(40, 0))).counts.values():
        assert packed in open_counts
        assert packed not in noised


def test_noise_past_what_can_be_drawn_refuses_the_release() -> None:
    with pytest.raises(BadBundle, match="noise"):
        packing(1e9, PROFILE)


def test_a_window_of_noise_stays_far_below_the_limit_of_a_message() -> None:
    [window] = windows(Noised(10.0, VARIABLES, Streams()), 1)
    bins = sum(PROFILE.bins.values())
    sent = wire.encode(wire.Envelope(boot=1, seq=1, at=0.0, body=window))
    assert len(sent) < 3 * bins + 300
