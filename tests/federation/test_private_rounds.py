"""Rounds whose terms weigh, whose clipping norm moves, whose cohorts and noise are drawn."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import Blobs
from cohorts import fleet, plan_of, varied
from scipy import stats
from torch import nn

from atoll.federation import parameters, training
from atoll.federation.checkpoints import Checkpoint, Checkpoints
from atoll.federation.client_app import Floor
from atoll.federation.cohort import draw
from atoll.federation.errors import RoundFailed
from atoll.federation.progress import PATIENCE
from atoll.federation.run import RoundReport
from atoll.federation.task import Examples, Split
from atoll.privacy.errors import BadParameters
from atoll.privacy.keystream import Keystream


class Fewer(Blobs):
    """Blobs of which the device has ``rows`` only."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def load(self, data: Path, split: Split) -> Examples:
        every = super().load(data, split)
        return Examples(every.x[: self._rows], every.y[: self._rows])


class Wide(Blobs):
    """A model of six thousand weights, so that noise has a variance to measure."""

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Linear(2, 2000)


class Coins(Keystream):
    """Coins that always fall the same way: a device is drawn where its value is 0."""

    def __init__(self, values: list[float]) -> None:
        self._values = np.array(values)

    def uniform(self, count: int) -> np.ndarray:
        return self._values[:count]


ROWS = {"device-1": 10, "device-2": 24, "device-3": 60}
CAP = 32


def weighed(mode: str = "plain", **privacy: object):
    return varied(
        plan_of(mode, count=1),
        training={"weighting": "capped", "weight_cap": CAP, "averaged_rounds": 1},
        privacy={"clip_norm": 100.0, "bits": 24, **privacy},
    )


@pytest.mark.parametrize("mode", ["plain", "he"])
def test_a_round_steps_by_the_weighed_mean(tmp_path: Path, mode: str) -> None:
    here = fleet(tmp_path, 3, {name: Fewer(rows) for name, rows in ROWS.items()})
    plan = weighed(mode, bits=20)
    done = here.run(plan)
    before = parameters.flatten(Blobs().model(plan.seed))
    changes = [
        training.train(
            Blobs().model(0),
            before,
            Fewer(rows).load(tmp_path / name, "train"),
            plan.training,
            training.local_seed(plan.seed, "run", 1, name),
        ).weights
        - before
        for name, rows in ROWS.items()
    ]
    weights = [min(rows, CAP) / CAP for rows in ROWS.values()]
    wanted = before + np.average(changes, axis=0, weights=weights)
    assert done.weights == pytest.approx(wanted, abs=2e-3)
    assert not np.allclose(done.weights, before + np.mean(changes, axis=0), atol=2e-3)


def test_encrypted_riders_ride_as_plain_ones_do(tmp_path: Path) -> None:
    def norms(mode: str) -> tuple[np.ndarray, list[float]]:
        plan = varied(
            plan_of(mode),
            training={"weighting": "capped", "weight_cap": CAP},
            privacy={"clip": "adaptive", "clip_quantile": 0.7},
        )
        reports: list[RoundReport] = []
        tasks = {name: Fewer(rows) for name, rows in ROWS.items()}
        done = fleet(tmp_path / mode, 3, tasks).run(plan, on_round=reports.append)
        return done.weights, [report.clip_norm for report in reports]

    plain, encrypted = norms("plain"), norms("he")
    assert np.array_equal(plain[0], encrypted[0])
    assert plain[1] == encrypted[1]
    assert len(set(plain[1])) == 3


def test_a_clipping_norm_that_all_are_within_shrinks_by_the_rule(tmp_path: Path) -> None:
    plan = varied(
        plan_of(count=4), privacy={"clip": "adaptive", "clip_norm": 1e4, "clip_rate": 0.3}
    )
    reports: list[RoundReport] = []
    fleet(tmp_path, 3).run(plan, on_round=reports.append)
    wanted = [1e4 * math.exp(-0.3 * 0.5 * number) for number in range(4)]
    assert [report.clip_norm for report in reports] == pytest.approx(wanted)


def test_a_fixed_clipping_norm_stays(tmp_path: Path) -> None:
    reports: list[RoundReport] = []
    fleet(tmp_path, 2).run(plan_of(), on_round=reports.append)
    assert [report.clip_norm for report in reports] == [2.0] * 3


def test_a_run_taken_up_again_goes_on_with_its_clipping_norm(tmp_path: Path) -> None:
    plan = varied(plan_of(count=5), privacy={"clip": "adaptive", "clip_norm": 1e3})
    undisturbed: list[RoundReport] = []
    wanted = fleet(tmp_path / "a", 3).run(plan, on_round=undisturbed.append)
    here, checkpoints = fleet(tmp_path / "b", 3), Checkpoints(tmp_path / "run")
    reports: list[RoundReport] = []

    def stop_after_two(report: RoundReport) -> None:
        reports.append(report)
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(plan, on_round=stop_after_two, checkpoints=checkpoints)
    done = here.run(plan, on_round=reports.append, checkpoints=checkpoints)
    assert [r.clip_norm for r in reports] == [r.clip_norm for r in undisturbed]
    assert len({r.clip_norm for r in reports}) == 5
    assert np.array_equal(done.weights, wanted.weights)


def test_a_checkpoint_from_before_norms_moved_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    kept = replace(Checkpoint.fresh("run", np.ones(3, np.float32)), clip_norm=0.25)
    checkpoints.save(kept)
    assert checkpoints.load("run").clip_norm == 0.25
    with np.load(tmp_path / "last.npz") as file:
        older = {name: file[name] for name in file.files if name != "clip_norm"}
    np.savez(tmp_path / "last.npz", **older)
    assert checkpoints.load("run").clip_norm is None


@pytest.mark.parametrize(
    ("noise", "colluders", "shares"),
    [("distributed", 0, 5 / 3), ("distributed", 1, 5 / 2), ("central", 1, 1.0)],
)
def test_noise_on_the_mean_has_the_predicted_variance(
    tmp_path: Path, noise: str, colluders: int, shares: float
) -> None:
    # Updates of nothing, so that what the run ends with is where it started and the noise.
    plan = varied(
        plan_of(count=1, least=3, noise=0.8),
        training={"learning_rate": 1e-12, "averaged_rounds": 1, "server_momentum": 0.0},
        privacy={"noise": noise, "colluders": colluders},
    )
    names = [f"device-{number}" for number in range(1, 6)]
    done = fleet(tmp_path, 5, {name: Wide() for name in names}).run(plan, task=Wide())
    drawn = done.weights - parameters.flatten(Wide().model(plan.seed))
    variance = shares * (0.8 * 2.0) ** 2 / 5**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], drawn.size - 1) / (drawn.size - 1)
    assert low * variance < drawn.var(ddof=1) < high * variance


def test_a_mean_that_hides_its_cohort_is_taken_over_the_expected_one(tmp_path: Path) -> None:
    # Ten of twelve are expected, eight come; the step is eight tenths of their mean. δ is large
    # so that so small a fleet may claim amplification at all.
    plan = varied(
        plan_of(count=1, least=2, noise=1e-3),
        training={"averaged_rounds": 1, "server_momentum": 0.0},
        cohort={"sampling_rate": 10 / 12},
        privacy={"noise": "central", "bits": 24, "delta": 0.05, "clip_norm": 50.0},
    )
    here = fleet(tmp_path, 12)
    before = parameters.flatten(Blobs().model(plan.seed))
    seed = next(
        seed
        for seed in range(500)
        if len(draw(here.cohort.trainers, 10 / 12, Keystream.replayable(seed))) == 8
    )
    reports: list[RoundReport] = []
    done = here.run(plan, entropy=Keystream.replayable(seed), on_round=reports.append)
    changes = [
        training.train(
            Blobs().model(0),
            before,
            Blobs().load(tmp_path / name, "train"),
            plan.training,
            training.local_seed(plan.seed, "run", 1, name),
        ).weights
        - before
        for name in reports[0].survivors
    ]
    assert len(changes) == 8
    # Noise of σ = 0.05 over 10.
    assert done.weights - before == pytest.approx(np.sum(changes, axis=0) / 10, abs=0.05)
    assert not np.allclose(done.weights - before, np.mean(changes, axis=0), atol=0.05)


def test_cohort_sizes_are_binomial_and_devices_are_drawn_on_their_own() -> None:
    names, rate, draws = [f"device-{n}" for n in range(30)], 0.3, 5000
    entropy = Keystream.replayable(11)
    cohorts = [draw(names, rate, entropy) for _ in range(draws)]
    sizes = np.bincount([len(one) for one in cohorts], minlength=31)
    expected = draws * stats.binom.pmf(np.arange(31), 30, rate)
    common = expected >= 5
    observed = np.append(sizes[common], sizes[~common].sum())
    binomial = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(observed, binomial).pvalue > 1e-4
    seen = Counter(name for one in cohorts for name in one)
    assert all(stats.binomtest(seen[name], draws, rate).pvalue > 1e-5 for name in names)
    both = sum(names[0] in one and names[1] in one for one in cohorts)
    assert stats.binomtest(both, draws, rate**2).pvalue > 1e-4
    assert draw(names, 1.0, entropy) == names


def test_who_is_drawn_does_not_depend_on_who_is_there(tmp_path: Path) -> None:
    plan = varied(plan_of(count=8), cohort={"sampling_rate": 0.6})
    here = fleet(tmp_path, 8)
    entropy = Keystream.replayable(4)
    wanted = [set(draw(here.cohort.trainers, 0.6, entropy)) for _ in range(8)]
    for node in (2, 5):
        here.grid.disconnect(node)
    reports: list[RoundReport] = []
    here.run(plan, on_round=reports.append, entropy=Keystream.replayable(4))
    for report, drawn in zip(reports, wanted, strict=True):
        absent = drawn & {"device-2", "device-5"}
        assert set(report.survivors) | set(report.dropped) == drawn
        if report.survivors:
            assert report.dropped == dict.fromkeys(absent, "not connected")
    assert any("device-2" in report.dropped for report in reports)


def test_unlucky_draws_are_thrown_away_and_charged_but_do_not_end_the_run(tmp_path: Path) -> None:
    plan = varied(plan_of(count=PATIENCE + 3), cohort={"sampling_rate": 0.5})
    charged: list[int] = []
    reports: list[RoundReport] = []
    done = fleet(tmp_path, 4).run(
        plan, charge=charged.append, on_round=reports.append, entropy=Coins([0, 1, 1, 1])
    )
    assert (done.ended, done.rounds) == ("complete", 0)
    assert charged == list(range(1, PATIENCE + 4))
    assert all(report.survivors == () for report in reports)
    assert reports[0].dropped == {"device-1": "drawn 1, connected of these 1, needed 2"}
    assert all(report.bytes_down == 0 for report in reports)


def test_cohorts_of_which_too_few_are_connected_do_end_the_run(tmp_path: Path) -> None:
    plan = varied(plan_of(count=9), cohort={"sampling_rate": 0.5})
    here = fleet(tmp_path, 4)
    here.grid.disconnect(1)
    reports: list[RoundReport] = []
    with pytest.raises(RoundFailed, match="drawn 2, connected of these 1, needed 2"):
        here.run(plan, on_round=reports.append, entropy=Coins([0, 0, 1, 1]))
    assert len(reports) == PATIENCE
    assert reports[0].dropped["device-1"] == "not connected"


@pytest.mark.parametrize("mode", ["plain", "he"])
def test_sampled_cohorts_train_a_model(tmp_path: Path, mode: str) -> None:
    plan = varied(plan_of(mode, count=4), cohort={"sampling_rate": 0.7})
    reports: list[RoundReport] = []
    done = fleet(tmp_path, 5).run(plan, on_round=reports.append, entropy=Keystream.replayable(2))
    assert done.rounds == sum(bool(report.survivors) for report in reports) >= 2
    assert len({report.survivors for report in reports}) > 1


def test_what_cannot_be_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    charged: list[int] = []
    here = fleet(tmp_path, 4)
    rare = varied(plan_of(least=3), cohort={"sampling_rate": 0.5})
    telling = varied(plan_of(noise=1.0), privacy={"delta": 0.25})
    for plan, says in ((rare, "raise cohort.sampling_rate"), (telling, "delta")):
        with pytest.raises(BadParameters, match=says):
            here.run(plan, charge=charged.append)
    assert charged == []


def run_with_floors(tmp_path, plan, **floors: Floor) -> RoundReport:
    reports: list[RoundReport] = []
    asked = {name.replace("_", "-"): floor for name, floor in floors.items()}
    fleet(tmp_path, 3, floors=asked).run(plan, on_round=reports.append)
    return reports[0]


@pytest.mark.parametrize(
    ("noise", "refusing"), [("distributed", {"device-2"}), ("central", {"device-2", "device-3"})]
)
def test_a_device_trains_only_where_as_much_noise_is_added_as_it_asks(
    tmp_path: Path, noise: str, refusing: set[str]
) -> None:
    plan = varied(
        plan_of("secagg" if noise == "distributed" else "plain", count=1, noise=0.5),
        privacy={"noise": noise},
        cohort={"min_devices": 2 if noise == "distributed" else 1},
    )
    report = run_with_floors(tmp_path, plan, device_2=Floor(0.6), device_3=Floor(0.5))
    assert set(report.dropped) == refusing
    assert "noise of multiplier 0.6 or more" in report.dropped["device-2"]


def test_riders_and_the_others_shares_do_not_talk_a_floor_away(tmp_path: Path) -> None:
    riding = varied(
        plan_of("secagg", count=1, noise=1.0),
        training={"weighting": "capped", "weight_cap": 10},
        privacy={"rider_noise_multiplier": 0.5, "bits": 20},
        cohort={"min_devices": 2},
    )
    report = run_with_floors(tmp_path / "riding", riding, device_1=Floor(0.5))
    assert "this round's is 0.447" in report.dropped["device-1"]  # (1 + 4)^-1/2
    plain = varied(plan_of(count=1, noise=1.0), cohort={"min_devices": 2})
    report = run_with_floors(tmp_path / "plain", plain, device_1=Floor(0.8))
    assert "this round's is 0.707" in report.dropped["device-1"]  # its share of two


def test_a_device_trains_only_among_as_many_as_it_asks(tmp_path: Path) -> None:
    plan = varied(plan_of("secagg", count=1), cohort={"min_devices": 2})
    report = run_with_floors(tmp_path, plan, device_1=Floor(devices=3), device_2=Floor(devices=2))
    assert set(report.dropped) == {"device-1"}
