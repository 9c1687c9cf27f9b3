"""Rows run what their plans say, and are held against the numbers that were published."""

import json

import msgspec
import numpy as np
import pytest
import torch

from atoll.federation import parameters, strategies, training
from atoll.federation import plan as plans
from atoll.simulations import (
    fashion,
    learning,
    partition,
    populations,
    published,
    simulable,
    simulate,
)
from atoll.simulations.populations import Simulated
from atoll.simulations.published import Ran
from benchmarks.results import document
from benchmarks.rows import Row as BenchmarkRow

SMALL = """
name = "test"
task = "digits"
model = "digits"
rounds = 3
[cohort]
min_devices = 2
[privacy]
mode = "plain"
clip_norm = 10.0
"""
NIID = [row for row in published.ROWS if row.source.startswith("Flower")]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_best_round_counts_and_folds_weigh_by_what_they_tested() -> None:
    assert published.best([Ran((0.3, 0.9, 0.8), 10)]) == 0.9
    assert published.pooled([Ran((0.5,), 30), Ran((0.1, 1.0), 10)]) == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("name", "at_most"), [("niid-fashion-fedavg", True), ("spar-known", False)]
)
def test_half_a_point_decides(name, at_most) -> None:
    (row,) = (row for row in published.ROWS if row.name == name)
    met = [published.met(row, row.value + apart) for apart in (-0.51, -0.49, 0.49, 0.51)]
    assert met == [False, True, True, not at_most]


def test_rows_are_those_of_benchmarks() -> None:
    row = published.report(published.ROWS[0], 99.2)
    assert msgspec.convert(row, BenchmarkRow, strict=True).met is True
    assert set(row) == {field.name for field in msgspec.structs.fields(BenchmarkRow)}
    said = document([("published", [row])], "a machine")
    assert "| 99.20 % | 99.10 % | 99.60 %, Burns et al. 2018 |" in said


def test_the_table_is_the_published_one() -> None:
    values = {row.name: row.value for row in published.ROWS}
    assert values["spar-known"] == 99.6
    assert values["spar-unseen"] == 87.3
    assert values["niid-fashion-fedavg"] == 88.09
    assert values["niid-fashion-fedprox"] == 88.15
    assert values["niid-fashion-scaffold"] == 88.44
    assert values["niid-fashion-fednova"] == 88.22


@pytest.mark.parametrize("row", NIID, ids=lambda row: row.name)
def test_the_plans_are_the_published_setting_and_weigh_by_examples(row) -> None:
    plan = plans.load(row.plan)
    simulable.check(plan, published.DEVICES, None, 44_426)
    how = plan.training
    setting = (plan.rounds, how.local_epochs, how.batch_size, how.learning_rate, how.momentum)
    assert setting == (50, 10, 64, 0.01, 0.9)
    assert (plan.name, plan.task, plan.seed) == (row.name, fashion.FashionMnist.name, 42)
    labels = np.repeat(np.arange(10), 6000)
    for seed in range(20):
        largest = max(len(part) for part in partition.dealt(labels, 10, 0.5, seed))
        assert largest <= how.weight_cap
    most = training.local_steps(how.weight_cap, how)
    assert how.step_cap == (most if row.name.endswith("fednova") else None)
    assert how.control_steps == (940 if row.name.endswith("scaffold") else None)
    assert how.proximal == (0.01 if row.name.endswith("fedprox") else 0)


def test_fednovas_effective_steps_are_the_baselines() -> None:
    """There: (τ - m·(1 - mᵗ)/(1 - m))/(1 - m), for τ steps and momentum m."""
    (row,) = (row for row in NIID if row.name == "niid-fashion-fednova")
    how = plans.load(row.plan).training
    for steps in (1, 10, 1880):
        closed = (steps - 0.9 * (1 - 0.9**steps) / 0.1) / 0.1
        assert strategies.effective_steps(steps, how) == pytest.approx(closed, rel=1e-9)


def small(tmp_path, *sizes):
    plan = tmp_path / "plan.toml"
    plan.write_text(SMALL)
    return published.ROWS[0]._replace(
        plan=plan,
        parts=lambda plan: [populations.named(plan.task, size, 0) for size in sizes],
    )


def test_a_row_that_has_ended_is_told_without_running_again(tmp_path) -> None:
    row, said = small(tmp_path, 5, 8), []
    first = published.run(row, tmp_path, said.append)
    assert [text.split("  ")[0] for text in said] == [
        f"spar-known, {part} of 2: round {number}/3" for part in (1, 2) for number in (1, 2, 3)
    ]
    assert 0 < first < 100
    assert published.run(row, tmp_path, said.append) == first
    assert len(said) == 6
    assert published.run(row, None, said.append) == first
    assert len(said) == 12


@pytest.mark.long
@pytest.mark.skipif(not fashion.place().is_dir(), reason="dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("row", NIID, ids=lambda row: row.name)
def test_a_published_row_learns_from_its_first_rounds(row) -> None:
    plan = plans.load(row.plan)
    brief = msgspec.structs.replace(
        plan, rounds=3, training=msgspec.structs.replace(plan.training, local_epochs=1)
    )
    (part,) = row.parts(plan)
    heard: list[simulate.Round] = []
    ended = simulate.run(brief, part, None, heard.append)
    assert [done.survivors for done in heard] == [10] * 3
    assert ended.accuracy > 0.4  # three epochs in all, on devices of few classes each
    assert heard[-1].loss < heard[0].loss


def test_weights_are_those_of_examples_and_nothing_is_clipped() -> None:
    """One round of FedAvg and of FedNova by hand, on devices of very unequal size."""
    rng = np.random.default_rng(0)
    task = fashion.FashionMnist()
    held = tuple(
        populations.Examples(rng.random((rows, 1, 28, 28), np.float32), rng.integers(0, 10, rows))
        for rows in (12, 70, 200, *[30] * 7)
    )
    there = Simulated(task, partition.DealtPopulation(held, held[0]))
    for row in (row for row in NIID if row.name.endswith(("fedavg", "fednova"))):
        plan = plans.load(row.plan)
        # The cap is the largest device's, as there: rounding is by a fixed step of w times Δ.
        brief = msgspec.structs.replace(plan.training, local_epochs=2, weight_cap=200)
        plan = msgspec.structs.replace(plan, rounds=1, training=brief)
        ended = simulate.run(plan, there, None, lambda _: None)
        start = parameters.flatten(task.model(plan.seed))
        changes, steps, sizes = [], [], np.array([len(one.y) for one in held])
        for device, one in enumerate(held):
            seed = training.local_seed(plan.seed, simulate.RUN, 1, learning.name_of(device))
            trained = training.train(task.model(0), start, one, plan.training, seed)
            changes.append(trained.weights.astype(np.float64) - start)
            taken = training.local_steps(len(one.y), plan.training)
            steps.append(strategies.effective_steps(taken, plan.training))
        shares = sizes / sizes.sum()
        if row.name.endswith("fedavg"):
            expected = shares @ np.array(changes)
        else:
            per_step = np.array(changes) / np.array(steps)[:, None]
            expected = (shares @ np.array(steps)) * (shares @ per_step)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(ended.weights - start, expected, atol=2e-5)


def test_missing_data_is_said_in_one_sentence(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(fashion.VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        published.main(["--only", "niid-fashion-fedavg"])
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err


def test_the_command_prints_rows_for_programs(tmp_path, capsys, monkeypatch) -> None:
    row = small(tmp_path, 4)._replace(value=99.9)
    monkeypatch.setattr(published, "ROWS", (row,))
    assert published.main(["--json", "--checkpoint", str(tmp_path)]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["met"] is False
    assert published.main(["--only", row.name, "--checkpoint", str(tmp_path)]) == 1
    assert "not met" in capsys.readouterr().out
