"""The benchmark of simulated training measures what it says, on a small cohort."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import simulation
from benchmarks.peers import environments
from benchmarks.peers.environments import PeerMissing
from benchmarks.peers.networks import NETWORKS


def test_every_network_is_measured_both_ways_and_a_missed_goal_is_the_exit_status(capsys):
    status = simulation.main(["--json", "--alone", "--devices", "3", "--repeats", "1"])
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert status == any(row["met"] is False for row in rows)
    assert len(rows) == len(simulation.CASES)
    for row, case in zip(rows, simulation.CASES, strict=True):
        assert row["case"].startswith(f"{case.name}: 3 devices")
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
        assert (row["goal"] is None) == (row["met"] is None)
    # The large one is measured, and is not what a simulation would train together.
    assert [row["goal"] is None for row in rows] == [True, False, False]


@pytest.mark.parametrize(
    ("rounds", "engine"),
    [(simulation.cifar(2, 1, 0.0), "one by one"), (simulation.hidden(2, 1), "batched")],
    ids=["simple_cnn", "one_hidden"],
)
def test_whole_rounds_are_run_and_timed_and_their_result_written(rounds, engine, tmp_path) -> None:
    simulation._write(tmp_path, rounds)
    given = {"folder": str(tmp_path), "network": rounds.network, "cohort": 2, "batch": 25}
    given |= {"rate": 0.1, "workers": 1, "dropout": 0.0, "warm": 1, "rounds": 1}
    given |= {"result": str(tmp_path / "ours.npy")}
    said = environments.measured([sys.executable, "-m", "benchmarks.simulated_rounds"], given)
    assert len(said["seconds"]) == 1
    assert said["engine"] == engine
    assert said["peak_bytes"] > 50e6
    before, after = np.load(tmp_path / "weights.npy"), np.load(tmp_path / "ours.npy")
    assert before.shape == after.shape
    assert 0 < np.abs(after - before).max() < 1


@pytest.mark.parametrize("rounds", [simulation.cifar(3, 1, 1.0), simulation.hidden(3, 1)])
def test_what_is_written_fits_the_network_with_and_without_dropout(rounds, tmp_path) -> None:
    simulation._write(tmp_path, rounds)
    x, y = np.load(tmp_path / "x.npy"), np.load(tmp_path / "y.npy")
    assert x.shape[:2] == y.shape == (3, simulation.ROWS)
    weights = torch.from_numpy(np.load(tmp_path / "weights.npy"))
    logits = []
    for dropout in (0.0, 1.0):
        net = NETWORKS[rounds.network](dropout).eval()
        torch.nn.utils.vector_to_parameters(weights, net.parameters())
        logits.append(net(torch.from_numpy(x[0])))
        # Flower sends a network's tensors by name.
        assert net.state_dict().keys() == NETWORKS[rounds.network](0.0).state_dict().keys()
    assert logits[0].shape == (simulation.ROWS, 10)
    assert torch.equal(*logits)


def test_a_peer_whose_round_does_other_work_is_found_out(tmp_path) -> None:
    rounds = simulation.hidden(2, 1)
    simulation._write(tmp_path, rounds)
    setting = {"folder": str(tmp_path), "network": rounds.network, "cohort": 2, "rate": 0.1}
    simulation.ours(setting | simulation._once(tmp_path, "ours"), 1)
    mine = np.load(tmp_path / "ours.npy")

    def way(off: float) -> simulation.Way:
        def run(_: str, given: simulation.Setting) -> dict[str, object]:
            np.save(str(given["result"]), mine + np.float32(off))
            return {}

        return "threads: 1", run

    simulation._agree(tmp_path, "pfl", setting, [way(0.0)])
    with pytest.raises(AssertionError, match="pfl"):
        simulation._agree(tmp_path, "pfl", setting, [way(1e-4)])


def test_a_peer_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(environments.ProgramFailed, match="not today"):
        environments.measured([sys.executable, "-c", "raise SystemExit('not today')"], {})
    with pytest.raises(environments.ProgramFailed, match="JSON"):
        environments.measured([sys.executable, "-c", "print('done')"], {})


def test_a_peer_that_is_missing_is_a_row_and_a_missed_goal_is_missed() -> None:
    rounds, best = simulation.cifar(50, 3, 1.0), {"seconds": [0.5, 0.4], "peak_bytes": 2e6}
    (row,) = simulation._rows(rounds, "pfl", best, PeerMissing("no network"))
    assert (row.ours, row.met, row.peer) == (2.5, None, None)
    assert row.peer_name == "pfl-research 0.6: not measured"
    for theirs, met in ((0.8, True), (0.79, False)):
        found = ("threads: 2", {"seconds": [1.0, theirs], "peak_bytes": 4e6})
        speed, memory = simulation._rows(rounds, "pfl", best, found)
        assert speed.ratio == pytest.approx(2.5 * theirs)
        assert (speed.met, memory.ratio) == (met, 2.0)


def test_a_small_network_is_held_beside_both_peers_without_a_goal() -> None:
    best = {"seconds": [0.1], "peak_bytes": 2e6}
    found = ("threads: 1", {"seconds": [0.05], "peak_bytes": 4e6})
    for peer in simulation.NAMES:
        speed, memory = simulation._rows(simulation.hidden(1000, 3), peer, best, found)
        assert speed.case == memory.case
        assert speed.case.startswith("one hidden layer, 64 values: 1,000 devices")
        assert (speed.ratio, speed.goal, speed.met) == (0.5, None, None)
        assert (memory.ratio, memory.goal, memory.met) == (2.0, None, None)
