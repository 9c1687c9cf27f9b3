"""Simulated rounds are real ones without messages, and remember nothing of any device."""

import json
import pickle
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from atoll.federation import batched, client_app, layout, parameters, rounds, training
from atoll.federation import plan as plans
from atoll.federation.cohort import Cohort, Member
from atoll.federation.engine import InProcessGrid
from atoll.federation.errors import BadPlan, RoundFailed
from atoll.federation.run import Run
from atoll.federation.task import Examples
from atoll.privacy import modes
from atoll.privacy.accounting import FixedSample, Gaussian, Unnoised, spent
from atoll.privacy.errors import BadParameters
from atoll.privacy.keystream import Keystream
from atoll.privacy.plain import PlainParty
from atoll.server.cli import app
from atoll.simulations import (
    cohorts,
    digits,
    learning,
    populations,
    simulable,
    simulate,
    simulate_report,
    trainers,
)
from atoll.simulations.populations import DirichletPopulation, Simulated, named
from atoll.simulations.spar import Spar
from benchmarks import process

sys.path.insert(0, str(Path(__file__).parents[1]))

import peaks  # after the path

PLAN = """
name = "test"
task = "digits"
model = "digits"
rounds = 4
seed = 3
[training]
batch_size = 8
learning_rate = 0.1
server_momentum = 0.5
averaged_rounds = 2
[cohort]
min_devices = 2
[privacy]
mode = "plain"
clip_norm = 0.4
bits = 20
"""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of(**sections):
    plan = plans.loads(PLAN)
    for name, fields in sections.items():
        changed = (
            msgspec.structs.replace(getattr(plan, name), **fields)
            if isinstance(fields, dict)
            else fields
        )
        plan = msgspec.structs.replace(plan, **{name: changed})
    return plan


def simulated(plan, devices, cohort=None):
    heard = []
    ended = simulate.run(plan, named("digits", devices, plan.seed), cohort, heard.append)
    return ended, heard


def through_the_engine(plan, population, folder: Path):
    """The same plan over real ClientApps that load the same examples from files."""
    apps, members = {}, {}
    for device in range(population.size):
        name = learning.name_of(device)
        held = folder / name
        held.mkdir()
        examples = population.examples(device, "train")
        np.savez(held / "train.npz", x=examples.x, y=examples.y)
        apps[device + 1] = client_app.build(
            digits.Digits(), held, lambda _mode, name=name: PlainParty(name), {}
        )
        members[name] = Member(device + 1, b"")
    grid, reports = InProcessGrid(apps), []
    shape = layout.of(digits.Digits(), plan.seed, plan.layers)
    run = Run(
        grid,
        plan,
        Cohort(members, list(members), []),
        name=simulate.RUN,
        session=modes.hub_session("plain", {}),
        charge=lambda *_: None,
        on_round=reports.append,
        clock=grid.clock,
        frozen=shape.frozen,
    )
    return rounds.run_rounds(run, shape.initial), reports


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "training": {"weighting": "capped", "weight_cap": 50, "local_epochs": 2},
            "privacy": {"clip": "adaptive", "clip_quantile": 0.4},
        },
        {"training": {"control_steps": 6}, "privacy": {"clip_norm": 5.0, "bits": 23}},
        {"training": {"control_steps": 6, "weighting": "capped", "weight_cap": 50}},
        {"layers": {"trained": ("3.*", "1.bias")}, "training": {"control_steps": 6}},
        {"layers": {"lora_layers": ("1", "3"), "lora_rank": 3}},
        {
            "codec": {"kind": "random-mask", "share": 0.3, "downlink": "float16"},
            "training": {"weighting": "capped", "weight_cap": 50},
        },
    ],
    ids=[
        *("fixed", "weights and clipping ride", "control variates", "clipped control variates"),
        *("a part", "adapters", "a mask"),
    ],
)
def test_without_noise_it_comes_out_as_over_real_client_apps(tmp_path, changes) -> None:
    plan = plan_of(**changes)
    ended, heard = simulated(plan, 5)
    there = named("digits", 5, plan.seed)
    outcome, reports = through_the_engine(plan, there.population, tmp_path)
    assert ended.engine == "batched"
    # A float32 difference may round an update's value the other way: by one step of the grid,
    # divided by the devices. 20 bits keep that below what is asked here.
    np.testing.assert_allclose(ended.weights, outcome.weights, atol=1e-5, rtol=0)
    initial = layout.of(digits.Digits(), plan.seed, plan.layers).initial
    assert np.abs(outcome.weights - initial).max() > 0.01
    assert (ended.rounds, ended.ended) == (outcome.rounds, outcome.ended)
    for mine, real in zip(heard, reports, strict=True):
        assert mine.survivors == len(real.survivors)
        assert mine.clip_norm == pytest.approx(real.clip_norm, rel=1e-6)
        assert mine.loss == pytest.approx(real.loss, abs=1e-3)


class Dropping(digits.Digits):
    """Its network draws at random in training."""

    def model(self, seed):
        return torch.nn.Sequential(super().model(seed), torch.nn.Dropout(0.1))


@pytest.mark.parametrize(
    ("task", "reason"), [(Dropping(), "random"), (Spar(), "faster")], ids=["dropout", "large"]
)
def test_a_model_that_gains_nothing_or_cannot_be_mapped_trains_one_by_one(task, reason) -> None:
    plan = plan_of(training={"batch_size": 16})
    trainer = trainers.trainer_of(task, plan)
    assert trainer.engine == "one by one"
    assert reason in trainer.reason
    shape = (8, *task.input_shape)
    examples = Examples(np.ones(shape, np.float32), np.zeros(8, np.int64))
    weights = parameters.flatten(task.model(0))
    (mine,) = trainer.train(weights, [batched.Client(examples, 5)])
    own = training.train(task.model(0), weights, examples, plan.training, 5)
    assert np.array_equal(mine.weights, own.weights)


def test_equal_seeds_give_equal_results_noise_and_cohorts_included() -> None:
    plan = plan_of(privacy={"noise_multiplier": 0.3, "noise": "central"}, rounds=2)
    first, heard = simulated(plan, 40, cohort=5)
    again, _ = simulated(plan, 40, cohort=5)
    other, _ = simulated(msgspec.structs.replace(plan, seed=4), 40, cohort=5)
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.weights, other.weights)
    assert [done.drawn for done in heard] == [5, 5]


def test_it_learns() -> None:
    ended, heard = simulated(plan_of(rounds=30, privacy={"clip_norm": 2.0}), 200, cohort=20)
    assert ended.accuracy > 0.8
    assert [done.round for done in heard if done.accuracy is not None] == [10, 20]


def test_a_poisson_cohort_is_drawn_and_charged_as_the_plan_says() -> None:
    central = {"noise_multiplier": 1.0, "noise": "central"}
    plan = plan_of(cohort={"sampling_rate": 0.25, "min_devices": 2}, privacy=central, rounds=3)
    _, heard = simulated(plan, 400)
    assert len({done.drawn for done in heard}) > 1
    assert all(60 < done.drawn < 140 for done in heard)
    assert all(done.survivors == done.drawn for done in heard)
    expected = spent([Gaussian(1.0, 0.25)] * 3, plan.privacy.delta).epsilon_pld
    assert heard[-1].epsilon == pytest.approx(expected, rel=1e-9)
    unsampled = spent([Gaussian(1.0)] * 3, plan.privacy.delta).epsilon_pld
    assert heard[-1].epsilon < unsampled


def test_a_fixed_cohort_is_secret_only_under_central_noise() -> None:
    for where, sampling in (("central", FixedSample(10, 500)), ("distributed", None)):
        plan = plan_of(privacy={"noise_multiplier": 0.7, "noise": where})
        assert cohorts.cost(plan, 500, 10) == Gaussian(0.7, sampling)
        assert cohorts.cost(plan, 500, None) == Gaussian(0.7)
        assert cohorts.cost(plan, 500, 500) == Gaussian(0.7)
    assert cohorts.cost(plan_of(), 500, 10) == Unnoised()


def test_a_draw_below_the_minimum_is_thrown_away_and_charged() -> None:
    plan = plan_of(
        cohort={"sampling_rate": 0.1, "min_devices": 2},
        privacy={"noise_multiplier": 2.0},
        rounds=12,
    )
    ended, heard = simulated(plan, 20)
    thrown = [done for done in heard if done.drawn < 2]
    assert thrown
    assert all(done.survivors == 0 and done.loss is None for done in thrown)
    assert ended.rounds == len(heard) - len(thrown)
    assert [done.epsilon for done in heard] == sorted({done.epsilon for done in heard})


def test_the_budget_ends_a_run() -> None:
    one = spent([Gaussian(2.0)], 1e-5).epsilon_pld
    noise = {"noise_multiplier": 2.0, "budget_epsilon": one * 1.01}
    ended, heard = simulated(plan_of(privacy=noise), 4)
    assert (ended.ended, ended.rounds, len(heard)) == ("budget", 1, 1)


def test_control_variates_are_kept_of_those_that_took_part() -> None:
    plan = plan_of(training={"control_steps": 6}, privacy={"clip_norm": 5.0, "bits": 23})
    task, population = named("digits", 50, plan.seed)
    model = task.model(plan.seed)
    weights, entropy = parameters.flatten(model), Keystream.replayable(1)
    trainer, trained = trainers.trainer_of(task, plan), parameters.mask(model)
    devices = learning.Devices(plan, population, None, trainer, "run", trained)
    shared = np.zeros(0, np.float32)
    for number, drawn in enumerate([[3, 8, 20], [8, 41]], start=1):
        heard = devices.learn(number, weights, 5.0, drawn, entropy, shared)
        shared = heard.learned.control
    assert sorted(devices.own) == [3, 8, 20, 41]
    assert shared == pytest.approx(sum(devices.own.values()) / 50, abs=1e-4)
    alone = devices.learn(3, weights, 5.0, [5], entropy, shared)
    assert alone.learned is None
    assert 5 not in devices.own


class Broken:
    """Devices whose updates are no numbers."""

    size = 4

    def examples(self, device, split):
        x = np.full((6, 1, 8, 8), np.nan, np.float32)
        return Examples(x, np.zeros(6, np.int64))


def test_devices_that_diverge_are_dropped_and_end_the_run_in_time() -> None:
    with pytest.raises(RoundFailed, match="diverged"):
        simulate.run(plan_of(), Simulated(digits.Digits(), Broken()), None, lambda _: None)


@pytest.mark.parametrize(
    ("changes", "devices", "cohort", "error"),
    [
        ({"cohort": {"sampling_rate": 0.5}}, 10, 5, r"cohort\.sampling_rate"),
        ({"cohort": {"size": 4}}, 10, None, r"cohort\.size cannot be simulated"),
        (
            {"cohort": {"min_devices": 3}, "aggregation": plans.Aggregation("median", 1)},
            10,
            None,
            r"\[aggregation\] cannot be simulated",
        ),
        ({}, 10, 11, "at most"),
        ({}, 10, 1, "min_devices"),
        ({"privacy": {"noise_multiplier": 1.0}}, 100_000, 10, "delta"),
        (
            {"privacy": {"examples": plans.ExamplePrivacy(1.0, 1.0, 0.1, 3)}},
            10,
            None,
            r"\[privacy\.examples\] cannot be simulated",
        ),
        ({"layers": {"local": ("3.*",)}}, 10, None, r"layers\.local cannot be simulated"),
        ({"layers": {"fine_tune": ("3.*",)}}, 10, None, r"layers\.fine_tune cannot be simulated"),
        ({"codec": {"kind": "top-k", "share": 0.1}}, 10, None, "devices keep nothing"),
    ],
    ids=[
        *(
            "two rules",
            "turns",
            "a robust rule",
            "too many",
            "too few",
            "delta",
            "examples",
            "local layers",
        ),
        *("fine-tuning", "error feedback"),
    ],
)
def test_what_cannot_be_simulated_is_refused(changes, devices, cohort, error) -> None:
    with pytest.raises((BadPlan, BadParameters), match=error):
        simulated(plan_of(**changes), devices, cohort)


@pytest.mark.parametrize("task", ["digits", "spar"])
def test_a_population_is_as_large_whatever_its_size(task) -> None:
    few, many = (named(task, size, 0).population for size in (100, 100_000))
    assert len(pickle.dumps(many)) - len(pickle.dumps(few)) < 16
    assert few.examples(7, "train").x.shape[1:] == many.examples(99_999, "train").x.shape[1:]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_round_takes_as_much_memory_whatever_the_population(sampled) -> None:
    sizes = (100, 100_000)
    rates = [f"sampling_rate = {50 / size}\n" if sampled else "" for size in sizes]
    texts = [PLAN.replace("[cohort]\n", f"[cohort]\n{rate}") for rate in rates]
    few, many = process.apart(peaks.of_rounds, texts, sizes, None if sampled else 50)
    block = 5 * 8 * cohorts.BLOCK  # the coins of a block of devices, a few times over
    assert many < few + block
    assert block < 8 * 100_000


def test_draws_in_blocks_are_one_draw_and_each_device_is_as_likely() -> None:
    size, rate = 3 * cohorts.BLOCK + 17, 0.01
    found = cohorts.sampled(size, rate, Keystream.replayable(1))
    coins = Keystream.replayable(1).uniform(size) < rate
    assert found == np.flatnonzero(coins).tolist()


def test_a_fixed_draw_has_so_many_and_each_set_is_as_likely() -> None:
    entropy, counts = Keystream.replayable(2), {}
    for _ in range(6000):
        found = tuple(cohorts.chosen(5, 3, entropy))
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 10
    # χ² with 9 degrees of freedom passes 27.9 once in a thousand.
    assert sum((count - 600) ** 2 / 600 for count in counts.values()) < 27.9
    assert cohorts.chosen(7, 7, entropy) == list(range(7))


def test_a_device_holds_the_same_whenever_it_is_asked_and_others_hold_other() -> None:
    population = named("digits", 1000, 5).population
    first, again = (population.examples(3, "train") for _ in range(2))
    assert np.array_equal(first.x, again.x)
    assert not np.array_equal(first.y, population.examples(4, "train").y)
    train, test = digits.pools()
    assert len(train.y) + len(test.y) == 1797
    rows = {row.tobytes() for row in test.x}
    assert all(row.tobytes() in rows for row in population.examples(3, "test").x)


def test_alpha_says_how_much_devices_differ() -> None:
    def largest_share(alpha: float) -> float:
        population = DirichletPopulation(300, *digits.pools(), seed=1, alpha=alpha, rows=200)
        shares = []
        for device in range(300):
            held = population.examples(device, "train").y
            shares.append(np.bincount(held, minlength=10).max() / len(held))
        return float(np.mean(shares))

    assert largest_share(0.05) > 0.75
    assert largest_share(1000.0) < 0.2
    sizes = [len(named("digits", 300, 1).population.examples(d, "train").y) for d in range(300)]
    # Poisson: the mean of 300 is within 4σ = 4·√(49/300) of 50.
    assert np.mean(sizes) == pytest.approx(populations.ROWS, abs=1.7)
    assert min(sizes) >= 1


def test_a_task_without_data_is_refused_by_name() -> None:
    with pytest.raises(BadPlan, match="digits, fashion-mnist, spar"):
        named("nothing", 3, 0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def atoll(*words):
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["simulate", *map(str, words)], env=environment)


def test_the_command_prints_facts_for_programs(file) -> None:
    asked = (file, "--devices", 30, "--cohort", 4, "--rounds", 2, "--seed", 9)
    said = atoll(*asked, "--json")
    assert said.exit_code == 0, said.output
    facts = json.loads(said.stdout)
    assert (facts["devices"], facts["seed"], facts["engine"]) == (30, 9, "batched")
    assert facts["rounds"]["done"] == facts["rounds"]["trained"] == 2
    assert facts["rounds"]["mean_cohort"] == 4
    assert [done["survivors"] for done in facts["history"]] == [4, 4]
    assert 0 <= facts["accuracy"] <= 1
    assert facts["privacy"]["epsilon"] is None
    assert facts["peak_memory"] > 10_000_000
    shown = atoll(*asked)
    assert shown.exit_code == 0
    assert f"{facts['accuracy']:.1%}" in shown.stdout
    assert "no noise" in shown.stdout
    assert "s for all rounds" in shown.stdout
    assert "worker processes included" in shown.stdout


def facts_of(accuracies, result=0.5):
    """The facts of a simulation whose rounds but the last were evaluated so."""
    heard = [
        simulate.Round(number, 2.0, 3, 3, 0.1, None, 1.0, accuracy)
        for number, accuracy in enumerate(accuracies, 1)
    ]
    ended = simulate.Ended(
        np.zeros(1, np.float32), len(heard), "complete", result, "batched", "", 0
    )
    return simulate_report.gather(plan_of(), 9, heard, ended, 1, 7)


def test_the_last_rounds_accuracy_is_told_apart_from_the_best_ones() -> None:
    facts = facts_of([0.3, 0.8, None, None])
    assert facts["accuracy"] == 0.5
    assert facts["last_round"] == {"round": 4, "accuracy": 0.5}
    assert facts["best_round"] == {"round": 2, "accuracy": 0.8}
    assert [done["accuracy"] for done in facts["history"]] == [0.3, 0.8, None, 0.5]
    assert simulate_report._best(facts) == "; best after round 2: 80.0%"
    facts = facts_of([0.3, None])
    assert facts["last_round"] == facts["best_round"] == {"round": 2, "accuracy": 0.5}
    assert simulate_report._best(facts) == ""
    facts = facts_of([])
    assert (facts["last_round"], facts["best_round"]) == (None, None)
    assert simulate_report.table(facts).row_count


def test_its_seconds_are_those_of_all_rounds() -> None:
    told = facts_of([None] * 5)["rounds"]
    assert (told["seconds"], told["per_second"], told["before"]) == (10.0, 0.5, 1)


def test_the_command_says_what_is_wrong_with_a_plan(file) -> None:
    said = atoll(file, "--devices", 3, "--cohort", 9)
    assert said.exit_code == 2
    assert "at most the 3 devices" in said.stderr


def test_the_plan_that_comes_along_can_be_simulated() -> None:
    path = Path(simulate.__file__).with_name("digits.toml")
    plan = plans.load(path)
    task = digits.Digits()
    length = len(parameters.flatten(task.model(0)))
    simulable.check(plan, 10_000, 100, length)
    assert plan.task == task.name
