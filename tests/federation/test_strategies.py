"""Strategies against their papers by hand, against Flower's classes, and through whole runs."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import Blobs, write
from cohorts import fleet, plan_of, varied
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedProx, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atoll.federation import (
    example_privacy,
    messages,
    parameters,
    plan,
    release,
    strategies,
    training,
)
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.errors import BadPlan
from atoll.federation.flower import claim_run
from atoll.federation.plan import ExamplePrivacy, Training
from atoll.federation.riders import Riders
from atoll.federation.run import RoundReport
from atoll.federation.strategies import effective_steps
from atoll.federation.task import Examples, Split
from atoll.privacy.update import Sums

ADAPTIVE = ["fedadam", "fedyogi", "fedadagrad"]
EVERY = ["fedavg", *ADAPTIVE]


class Fewer(Blobs):
    """Blobs of which the device has ``rows`` only."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def load(self, data: Path, split: Split) -> Examples:
        every = super().load(data, split)
        return Examples(every.x[: self._rows], every.y[: self._rows])


def updates(strategy: strategies.Strategy, *means: float) -> list[float]:
    state, found = strategy.init(1), []
    for mean in means:
        state, update = strategy.step(state, np.array([mean]))
        found.append(float(update[0]))
    return found


# --- by hand ---


def test_fedavg_steps_by_the_mean_and_fedavgm_by_the_mean_and_half_of_the_last_step() -> None:
    assert updates(strategies.of(Training()), 2.0, 1.0) == [2.0, 1.0]
    halved = Training(server_momentum=0.5, server_learning_rate=0.25)
    assert updates(strategies.of(halved), 2.0, 1.0, 0.0) == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # m = 1, then 1. v = ¾·1 + ¼·4 = 7/4, then ¾·7/4 + ¼·1 = 25/16.
        ("fedadam", [3 / (math.sqrt(7 / 4) + 1), 3 / (5 / 4 + 1)]),
        # v = 1 - ¼·4·sign(1 - 4) = 2, then 2 - ¼·1·sign(2 - 1) = 7/4.
        ("fedyogi", [3 / (math.sqrt(2) + 1), 3 / (math.sqrt(7 / 4) + 1)]),
        # v = 1 + 4 = 5, then 5 + 1 = 6.
        ("fedadagrad", [3 / (math.sqrt(5) + 1), 3 / (math.sqrt(6) + 1)]),
    ],
)
def test_two_rounds_of_algorithm_2(name: str, wanted: list[float]) -> None:
    how = Training(
        strategy=name,
        server_learning_rate=3.0,
        server_momentum=0.5,
        server_tau=1.0,
        server_beta2=None if name == "fedadagrad" else 0.75,
    )
    assert updates(strategies.of(how), 2.0, 1.0) == pytest.approx(wanted, rel=1e-6)


def test_what_a_plan_leaves_out_is_as_the_papers_have_it() -> None:
    # β1 = 0.9, β2 = 0.99, τ = 1e-3; FedAdagrad without momentum.
    assert updates(strategies.of(Training(strategy="fedadam")), 1.0)[0] == pytest.approx(
        0.1 * 0.1 / (math.sqrt(0.99e-6 + 0.01) + 1e-3)
    )
    assert updates(strategies.of(Training(strategy="fedyogi")), 1.0)[0] == pytest.approx(
        0.1 * 0.1 / (math.sqrt(1e-6 + 0.01) + 1e-3)
    )
    assert updates(strategies.of(Training(strategy="fedadagrad")), 1.0)[0] == pytest.approx(
        0.1 * 1.0 / (math.sqrt(1e-6 + 1) + 1e-3)
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.sampled_from(EVERY))
def test_each_weight_is_stepped_on_its_own(means: list[float], name: str) -> None:
    strategy = strategies.of(Training(strategy=name, server_momentum=0.5))
    together, state = [], strategy.init(2)
    for mean in means:
        state, update = strategy.step(state, np.array([1.0, mean]))
        assert all(kept.dtype == np.float32 and kept.shape == (2,) for kept in state)
        together.append(float(update[1]))
    assert together == updates(strategy, *means)


@given(st.floats(1e-6, 1e6), st.sampled_from(["fedadam", "fedyogi"]))
def test_an_adaptive_step_hardly_grows_with_the_mean(size: float, name: str) -> None:
    (update,) = updates(strategies.of(Training(strategy=name)), size)
    assert 0 < update < 0.1  # η·(1 - β1)/√(1 - β2) = η


# --- beside Flower ---

FLOWERS: dict[str, tuple[Callable[[], object], Training]] = {
    "fedavgm": (
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.8),
        Training(server_learning_rate=0.5, server_momentum=0.8),
    ),
    "fedprox": (lambda: FedProx(proximal_mu=0.1), Training(proximal=0.1)),
    "fedadam": (
        lambda: FedAdam(eta=0.03, beta_1=0.8, beta_2=0.95, tau=1e-2),
        Training(
            strategy="fedadam",
            server_learning_rate=0.03,
            server_momentum=0.8,
            server_beta2=0.95,
            server_tau=1e-2,
        ),
    ),
    "fedyogi": (
        lambda: FedYogi(eta=0.03, beta_1=0.8, beta_2=0.95, tau=1e-2),
        Training(
            strategy="fedyogi",
            server_learning_rate=0.03,
            server_momentum=0.8,
            server_beta2=0.95,
            server_tau=1e-2,
        ),
    ),
    "fedadagrad": (
        lambda: FedAdagrad(eta=0.03, tau=1e-2),
        Training(strategy="fedadagrad", server_learning_rate=0.03, server_tau=1e-2),
    ),
}


def reply(weights: np.ndarray, rows: int) -> Message:
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(weights)}),
            "metrics": MetricRecord({"num-examples": rows}),
        }
    )
    return Message(content, 1, "train")


@pytest.mark.parametrize("name", FLOWERS)
def test_rounds_end_where_flowers_own_class_ends(name: str) -> None:
    claim_run(1)
    build, how = FLOWERS[name]
    theirs, ours = build(), strategies.of(how)
    rng = np.random.default_rng(5)
    weights = rng.normal(size=40)
    mine, state, rows = weights.copy(), ours.init(40), np.array([10, 30, 60])
    for number in range(1, 6):
        changes = rng.normal(size=(3, 40)) * 10.0 ** rng.integers(-4, 1, size=40)
        if name in ADAPTIVE:
            theirs.current_arrays = {"w": weights}
        if name in ADAPTIVE and number == 1:
            # Flower starts v at zero; algorithm 2 wants τ² at least.
            theirs.v_t = {"w": np.full(40, theirs.tau**2)}
        if name == "fedadam":
            # Flower corrects for the bias of a v₋₁ of zero; algorithm 2 does not.
            corrected = math.sqrt(1 - 0.95 ** (number + 1)) / (1 - 0.8 ** (number + 1))
            theirs.eta = 0.03 / corrected
        if name == "fedavgm" and number == 1:
            theirs.current_arrays = ArrayRecord({"w": Array(weights)})
        replies = [reply(weights + c, int(n)) for c, n in zip(changes, rows, strict=True)]
        weights = theirs.aggregate_train(number, replies)[0]["w"].numpy()
        state, update = ours.step(state, np.average(changes, axis=0, weights=rows))
        mine = mine + update
    # Ours keeps moments in float32.
    assert mine == pytest.approx(weights, rel=1e-5, abs=1e-6)


# --- whole runs ---


def training_of(name: str, **more: object) -> dict[str, object]:
    given = {"server_learning_rate": 1.0 if name == "fedavg" else 0.05, "averaged_rounds": 1}
    return {"strategy": name, "server_momentum": 0.5, **given, **more}


def reference(name: str, mean: np.ndarray, kept: list[np.ndarray]) -> np.ndarray:
    """One round's step as the papers write it; ``kept`` is m and v, changed in place."""
    if name == "fedavg":
        kept[0] = 0.5 * kept[0] + mean
        return kept[0]
    kept[0] = 0.5 * kept[0] + 0.5 * mean
    square = mean * mean
    kept[1] = {
        "fedadam": 0.99 * kept[1] + 0.01 * square,
        "fedyogi": kept[1] - 0.01 * square * np.sign(kept[1] - square),
        "fedadagrad": kept[1] + square,
    }[name]
    return 0.05 * kept[0] / (np.sqrt(kept[1]) + 1e-3)


def locally(the_plan: plan.Plan, folder: Path, weights: np.ndarray, number: int) -> np.ndarray:
    return np.array(
        [
            training.train(
                Blobs().model(0),
                weights,
                Blobs().load(folder / name, "train"),
                the_plan.training,
                training.local_seed(the_plan.seed, "run", number, name),
            ).weights
            - weights
            for name in ("device-1", "device-2", "device-3")
        ],
        dtype=np.float64,
    )


@pytest.mark.parametrize("name", EVERY)
def test_a_run_without_noise_is_the_papers_loop(tmp_path: Path, name: str) -> None:
    the_plan = varied(
        plan_of(count=3),
        training=training_of(name, proximal=0.2),
        privacy={"bits": 24, "clip_norm": 50.0},
    )
    done = fleet(tmp_path, 3).run(the_plan)
    weights = start = parameters.flatten(Blobs().model(the_plan.seed))
    kept = [np.zeros(weights.size), np.full(weights.size, 1e-6)]
    learned = parameters.mask(Blobs().model(0))
    for number in range(1, 4):
        mean = locally(the_plan, tmp_path, weights, number).mean(axis=0)
        step = reference(name, mean, kept)
        weights = (weights + np.where(learned, step, mean)).astype(np.float32)
    # A step of rounding is 6e-6 and moves an adaptive step by 0.05·6e-6/1e-3 at most.
    assert done.weights == pytest.approx(weights, abs=2e-3)
    assert np.abs(done.weights - start).max() > 0.05


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_ends_where_the_undisturbed_one_does(tmp_path: Path, name: str) -> None:
    the_plan = varied(plan_of(count=4), training=training_of(name, step_cap=8))
    undisturbed = fleet(tmp_path / "a", 3).run(the_plan)
    here, checkpoints = fleet(tmp_path / "b", 3), Checkpoints(tmp_path / "run")

    def stop_after_two(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(the_plan, on_round=stop_after_two, checkpoints=checkpoints)
    kept = checkpoints.load("run")
    assert len(kept.moments) == (1 if name == "fedavg" else 2)
    assert all(moment.any() for moment in kept.moments)
    done = here.run(the_plan, checkpoints=checkpoints)
    assert np.array_equal(done.weights, undisturbed.weights)


def test_a_checkpoint_from_before_there_were_strategies_goes_on(tmp_path: Path) -> None:
    the_plan = plan_of(count=4)
    undisturbed = fleet(tmp_path / "a", 3).run(the_plan)
    here, checkpoints = fleet(tmp_path / "b", 3), Checkpoints(tmp_path / "run")

    def stop_after_two(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(the_plan, on_round=stop_after_two, checkpoints=checkpoints)
    with np.load(tmp_path / "run" / "last.npz") as file:
        older = {name: file[name] for name in file.files if name != "moments"}
        older["velocity"] = file["moments"][0]
    np.savez(tmp_path / "run" / "last.npz", **older)
    done = here.run(the_plan, checkpoints=checkpoints)
    assert np.array_equal(done.weights, undisturbed.weights)


@pytest.mark.parametrize("mode", ["he", "secagg"])
def test_a_hidden_sum_steps_as_a_plain_one(tmp_path: Path, mode: str) -> None:
    def run(how: str) -> np.ndarray:
        changes = training_of("fedyogi", step_cap=6, weighting="capped", weight_cap=40)
        the_plan = varied(plan_of(how), training=changes, privacy={"clip": "adaptive"})
        tasks = {"device-1": Fewer(10), "device-2": Fewer(30)}
        return fleet(tmp_path / how, 3, tasks).run(the_plan).weights

    assert np.array_equal(run(mode), run("plain"))


# --- plans ---

EXAMPLES = """
[privacy.examples]
noise_multiplier = 1.0
clip_norm = 1.0
sampling_rate = 0.1
steps = 5
"""


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            "server_beta2 = 0.9",
            "training.server_beta2 belongs to fedadam and fedyogi; fedavg keeps",
        ),
        ('strategy = "fedadagrad"\nserver_beta2 = 0.9', "fedadagrad keeps no moving"),
        ("server_tau = 0.1", "fedavg adapts nothing"),
        ("learning_rate = 1.0\nproximal = 3.8", "pulls past where it pulls to"),
        ("step_cap = 0", "step_cap"),
        ("step_cap = 9\nmomentum = 1.0", "never lets a gradient go"),
        ("proximal = -1.0", "proximal"),
        ('strategy = "fednova"', "strategy"),
        (f"step_cap = 9\n{EXAMPLES}", "leave training.step_cap out"),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(fields: str, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        plan.loads(f'name = "p"\ntask = "t"\nmodel = "m"\n[training]\n{fields}\n')


def test_an_instruction_from_before_there_were_strategies_is_plain_sgd() -> None:
    fields = dict.fromkeys(
        ("local_epochs", "batch_size", "learning_rate", "momentum", "clip_norm"), 1
    )
    ask = messages.TrainAsk(task="t", weights=b"", seed=0, bits=16, noise_multiplier=0.0, **fields)
    content = messages.pack(ask)
    for field in ("proximal", "most_steps"):
        del content.config_records["train"][field]
    assert messages.unpack(content, messages.TrainAsk) == ask
    assert (ask.proximal, ask.most_steps) == (0.0, 0.0)


# --- the proximal term ---


class Constant(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def displacement(how: Training, gradients: list[float]) -> float:
    """Where given gradients of the loss take one weight from zero, over the learning rate."""
    model = Constant()
    descent = training.Sgd(model, how)
    for gradient in gradients:
        model.w.grad = torch.full((1,), gradient, dtype=torch.float64)
        descent.step()
    return -float(model.w.detach()) / how.learning_rate


def test_the_proximal_term_by_hand() -> None:
    # ημ = 1/4. w/η: -1, then -1 - (1 - ¼) = -1¾, then -1¾ - (1 - ¼·7/4) = -2 5/16.
    how = Training(learning_rate=0.5, momentum=0.0, proximal=0.5)
    assert displacement(how, [1.0]) == 1.0
    assert displacement(how, [1.0] * 2) == 1.75
    assert displacement(how, [1.0] * 3) == 2.3125


def proximal_by_torch(
    model: nn.Module, examples: Examples, how: Training, mu: float, epochs: int
) -> np.ndarray:
    """Full batches with the term in the loss itself, differentiated by autograd."""
    start = [p.detach().clone() for p in model.parameters()]
    theirs = torch.optim.SGD(model.parameters(), lr=how.learning_rate, momentum=how.momentum)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    for _ in range(epochs):
        theirs.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        for parameter, before in zip(model.parameters(), start, strict=True):
            loss = loss + mu / 2 * (parameter - before).square().sum()
        loss.backward()
        theirs.step()
    return parameters.flatten(model)


def test_local_training_minimises_the_loss_with_the_proximal_term(tmp_path: Path) -> None:
    examples = Blobs().load(write(tmp_path, 3), "train")
    start = parameters.flatten(Blobs().model(1))

    def ours(mu: float) -> np.ndarray:
        how = Training(local_epochs=6, batch_size=60, learning_rate=0.1, proximal=mu)
        return training.train(Blobs().model(0), start, examples, how, seed=5).weights

    wanted = proximal_by_torch(
        Blobs().model(1).train(), examples, Training(learning_rate=0.1), 2.0, 6
    )
    assert ours(2.0) == pytest.approx(wanted, abs=1e-5)
    assert np.abs(ours(0.0) - wanted).max() > 0.01


def test_steps_that_protect_examples_have_the_proximal_term_too(tmp_path: Path) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(2, 2)

    examples, how = Blobs().load(write(tmp_path, 3), "train"), Training(proximal=2.0)
    with torch.random.fork_rng(devices=[]):
        start = parameters.flatten(model(1))
        done = example_privacy.descend(
            model(2),
            start,
            examples,
            how,
            ExamplePrivacy(noise_multiplier=1.0, clip_norm=100.0, sampling_rate=1.0, steps=6),
            batches=[np.arange(60)] * 6,
            noise=lambda count: np.zeros(count, np.int64),
            seed=0,
        )
        wanted = proximal_by_torch(model(1), examples, how, 2.0, 6)
        free = proximal_by_torch(model(1), examples, how, 0.0, 6)
    assert done.weights == pytest.approx(wanted, abs=2e-4)
    assert np.abs(free - wanted).max() > 0.01


# --- FedNova ---


@given(st.integers(0, 300), st.floats(0.01, 0.99))
def test_effective_steps_are_the_papers(steps: int, share: float) -> None:
    plain = Training(momentum=0.0)
    assert effective_steps(steps, plain) == steps
    heavy = (steps - share * (1 - share**steps) / (1 - share)) / (1 - share)
    assert effective_steps(steps, Training(momentum=share)) == pytest.approx(heavy, rel=1e-9)
    near = Training(momentum=0.0, learning_rate=0.5, proximal=2 * share)
    pulled = (1 - (1 - share) ** steps) / share
    assert effective_steps(steps, near) == pytest.approx(pulled, rel=1e-9)


@given(st.integers(1, 12), st.floats(0, 0.95), st.floats(0, 3))
@settings(max_examples=40)
def test_effective_steps_are_what_each_gradient_weighs(
    steps: int, momentum: float, proximal: float
) -> None:
    how = Training(learning_rate=0.5, momentum=momentum, proximal=proximal)
    weighs = [displacement(how, [float(k == at) for k in range(steps)]) for at in range(steps)]
    wanted = np.abs(weighs).sum()
    assert effective_steps(steps, how) == pytest.approx(wanted, rel=1e-6)


class Counting(nn.Linear):
    """Counts the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=60)
def test_local_steps_are_those_that_are_taken(rows: int, batch: int, epochs: int) -> None:
    how, model = Training(local_epochs=epochs, batch_size=batch), Counting()
    examples = Examples(np.zeros((rows, 2), np.float32), np.zeros(rows, np.int64))
    training.train(model, parameters.flatten(model), examples, how, 0)
    assert training.local_steps(rows, how) == model.seen


ROWS = {"device-1": 10, "device-2": 32, "device-3": 60}


def nova(folder: Path, **more: object) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """One round's step, each device's change, and their effective steps."""
    how = {"server_momentum": 0.0, "averaged_rounds": 1, "batch_size": 8, "proximal": 0.3, **more}
    the_plan = varied(plan_of(count=1), training=how, privacy={"bits": 24, "clip_norm": 50.0})
    tasks = {name: Fewer(rows) for name, rows in ROWS.items()}
    done = fleet(folder, 3, tasks).run(the_plan)
    start = parameters.flatten(Blobs().model(the_plan.seed))
    changes = [
        training.train(
            Blobs().model(0),
            start,
            Fewer(rows).load(folder / name, "train"),
            the_plan.training,
            training.local_seed(the_plan.seed, "run", 1, name),
        ).weights
        - start
        for name, rows in ROWS.items()
    ]
    # Batches of eight: 2, 4 and 8 of them.
    counted = [effective_steps(steps, the_plan.training) for steps in (2, 4, 8)]
    return done.weights - start, np.array(changes, np.float64), counted


@pytest.mark.parametrize("cap", [None, 40])
def test_a_round_steps_by_fednovas_rule(tmp_path: Path, cap: int | None) -> None:
    weighting = {} if cap is None else {"weighting": "capped", "weight_cap": cap}
    step, changes, counted = nova(tmp_path, step_cap=8, **weighting)
    weights = np.array([1, 1, 1] if cap is None else [10 / 40, 32 / 40, 1.0])
    shares = weights / weights.sum()
    wanted = (shares @ counted) * (shares / counted) @ changes
    assert step == pytest.approx(wanted, abs=1e-3)
    assert np.abs(wanted - shares @ changes).max() > 0.05


def test_a_device_of_more_steps_than_the_cap_counts_as_one_of_so_many(tmp_path: Path) -> None:
    step, changes, counted = nova(tmp_path, step_cap=4)
    said = np.mean([counted[0], counted[1], counted[1]])
    wanted = said * np.mean(changes / np.array(counted)[:, None], axis=0)
    assert step == pytest.approx(wanted, abs=1e-3)


def test_devices_of_equal_steps_are_averaged_as_without_fednova(tmp_path: Path) -> None:
    the_plan = varied(plan_of(), privacy={"bits": 24, "clip_norm": 50.0})
    even = fleet(tmp_path / "a", 3).run(varied(the_plan, training={"step_cap": 9}))
    plain = fleet(tmp_path / "b", 3).run(the_plan)
    assert even.weights == pytest.approx(plain.weights, abs=1e-3)


def test_the_ledger_is_charged_for_the_steps_that_ride() -> None:
    the_plan = varied(plan_of(noise=1.0), training={"step_cap": 9})
    spec = release.update_spec(the_plan, 1.0)
    assert spec.riders == 1
    assert spec.multiplier == pytest.approx((1 + 1 / 25) ** -0.5)


@given(st.floats(-1e9, 1e9))
def test_noise_on_the_steps_leaves_their_mean_in_its_range(said: float) -> None:
    riders = Riders(most_steps=20.0)
    spec = release.update_spec(plan_of(), 1.0)
    got = riders.mean(Sums(np.array([5.0]), np.array([said])), spec, 5)
    assert 1.0 <= got[0] <= 20.0
    assert got[0] == pytest.approx(min(max(said / 5 * 20.0, 1.0), 20.0))


@given(st.integers(0, 500), st.floats(1, 1e4), st.floats(0, 1e5), st.booleans())
def test_each_number_that_rides_is_within_one(
    cap: int,
    most: float,
    steps: float,
    within: bool,  # noqa: FBT001
) -> None:
    riders = Riders(cap, 0.4, most)
    values = riders.values(9, within=within, steps=steps)
    assert len(values) == riders.count == 2 + bool(cap)
    assert all(-1 <= value <= 1 for value in values)


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({}, "FedAvg with momentum"),
        ({"server_momentum": None}, "FedAvg"),
        ({"strategy": "fedyogi"}, "FedYogi"),
        (
            {"server_momentum": None, "proximal": 0.1, "step_cap": 9},
            "FedAvg with FedProx and FedNova",
        ),
        ({"strategy": "fedadam", "control_steps": 9}, "FedAdam with SCAFFOLD"),
    ],
)
def test_a_plans_strategy_has_a_name(training: dict[str, object], named: str) -> None:
    assert strategies.title(varied(plan_of(), training=training)) == named
