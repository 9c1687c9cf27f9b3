"""SCAFFOLD by hand, against closed forms and Flower's baseline, and through whole runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from blobs import Blobs, write
from cohorts import Fleet, fleet, plan_of, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atoll.federation import (
    control,
    example_privacy,
    local_update,
    parameters,
    plan,
    release,
    training,
)
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.control import Control
from atoll.federation.errors import BadPlan
from atoll.federation.kept import Carried, KeptHere
from atoll.federation.plan import ExamplePrivacy, Training
from atoll.federation.run import RoundReport
from atoll.federation.task import Examples, Split
from atoll.privacy import update
from atoll.privacy.errors import BadParameters

ALL = np.ones((), np.bool_)
FINE = {"bits": 24, "clip_norm": 50.0}


# --- one weight, quadratic losses ---


class Weight(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float32))


class Quadratic:
    """A device whose loss is ``bend``/2·(w - ``at``)², taking ``steps`` steps a round."""

    def __init__(self, bend: float, at: float, steps: int) -> None:
        self.bend, self.at, self.steps = bend, at, steps
        self.own = np.zeros(1, np.float32)

    def change(self, start: float, how: Training, correction: np.ndarray | None) -> np.ndarray:
        model = Weight()
        parameters.unflatten(model, np.array([start], np.float32))
        descent = training.Sgd(model, how, correction)
        for _ in range(self.steps):
            model.w.grad = self.bend * (model.w.detach() - self.at)
            descent.step()
        return parameters.flatten(model) - np.float32(start)


def plan_for(how: Training, noise: float = 0.0) -> plan.Plan:
    return varied(
        plan_of(noise=noise),
        training={name: getattr(how, name) for name in Training.__struct_fields__},
    )


def scaffold(
    devices: Sequence[Quadratic],
    how: Training,
    rounds: Sequence[Sequence[int]],
    start: float = 0.0,
) -> list[tuple[float, float]]:
    """The weight and the hub's control variate after each round, in which so many take part."""
    the_plan, found = plan_for(how), []
    x, shared = start, np.zeros(0, np.float32)
    for taking in rounds:
        sents = []
        for i in taking:
            one = devices[i]
            hubs = shared if len(shared) else np.zeros(1, np.float32)
            mine = Control(one.own, hubs, control.scale(how), 1.0)
            change = one.change(x, how, mine.correction)
            sent = mine.sent(change, control.reach(one.steps, how), ALL)
            one.own = mine.following(sent)
            sents.append(sent)
        mean, shared = control.following(
            the_plan, np.mean(sents, axis=0), shared, len(taking) / len(devices)
        )
        x += float(mean[0])
        found.append((x, float(shared[0])))
    return found


def test_two_devices_and_two_rounds_by_hand() -> None:
    # Losses (w - 4)²/2 and (w + 2)²; two steps of rate 1/4 from 0, without momentum.
    how = Training(learning_rate=0.25, momentum=0.0, control_steps=2)
    one, two = Quadratic(1.0, 4.0, 2), Quadratic(2.0, -2.0, 2)
    (first,) = scaffold([one, two], how, [[0, 1]])
    # y₁: 0, 1, 1¾. y₂: 0, -1, -1½. x = 1/8. cᵢ = -2yᵢ: -3½, 3. c = -¼.
    assert (float(one.own[0]), float(two.own[0])) == (-3.5, 3.0)
    assert first == (0.125, -0.25)
    # Again from the start, two rounds. c - cᵢ: 3¼, -3¼.
    one, two = Quadratic(1.0, 4.0, 2), Quadratic(2.0, -2.0, 2)
    second = scaffold([one, two], how, [[0, 1], [0, 1]])[1]
    # y₁ = 1/8 - ¼(-31/8 + 13/4) = 9/32; then 9/32 - ¼(-119/32 + 104/32) = 51/128.
    # y₂ = 1/8 - ¼(17/4 - 13/4) = -1/8; then -1/8 - ¼(15/4 - 13/4) = -1/4.
    # x = 1/8 + ½(35/128 - 48/128) = 19/256. cᵢ⁺ = cᵢ - c - 2(yᵢ - x).
    assert float(one.own[0]) == -3.5 + 0.25 - 2 * 35 / 128
    assert float(two.own[0]) == 3.0 + 0.25 + 2 * 48 / 128
    assert second == (19 / 256, (one.own[0] + two.own[0]) / 2)


def test_devices_that_differ_lead_fedavg_astray_and_scaffold_not() -> None:
    bends, ats, steps = [1.0, 0.2, 0.5], [3.0, -1.0, 8.0], [6, 2, 4]
    devices = [Quadratic(*each) for each in zip(bends, ats, steps, strict=True)]
    best = np.dot(bends, ats) / np.sum(bends)
    how = Training(learning_rate=0.3, momentum=0.0, control_steps=4)
    x = 0.0
    for _ in range(200):
        x += float(np.mean([one.change(x, how, None)[0] for one in devices]))
    pulls = 1 - (1 - 0.3 * np.array(bends)) ** np.array(steps)
    assert x == pytest.approx(np.dot(pulls, ats) / pulls.sum(), abs=1e-5)  # FedAvg's fixed point
    assert abs(x - best) > 0.25
    every = [[0, 1, 2]] * 200
    assert scaffold(devices, how, every)[-1] == pytest.approx((best, 0.0), abs=1e-4)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_leaves_the_optimum_where_it_is(momentum: float) -> None:
    devices = [Quadratic(1.0, 3.0, 6), Quadratic(0.2, -1.0, 3)]
    best = (3.0 - 0.2) / 1.2
    how = Training(learning_rate=0.02, momentum=momentum, control_steps=5)
    at = scaffold(devices, how, [[0, 1]] * 400)[-1]
    assert at == pytest.approx((best, 0.0), abs=1e-4)
    # There a device's steps stand still, each of them.
    mine = Control(devices[0].own, np.zeros(1, np.float32), 1.0, 1.0)
    assert devices[0].change(best, how, mine.correction) == pytest.approx(0.0, abs=1e-4)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, unique=True), min_size=1, max_size=8),
    st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(-5, 5)), min_size=4, max_size=4),
)
@settings(max_examples=40)
def test_the_hubs_variate_is_the_mean_of_the_devices_whoever_takes_part(
    rounds: list[list[int]], losses: list[tuple[float, float]]
) -> None:
    devices = [Quadratic(*loss, steps=i + 1) for i, loss in enumerate(losses)]
    how = Training(learning_rate=0.1, momentum=0.3, control_steps=3)
    _, shared = scaffold(devices, how, rounds)[-1]
    assert shared == pytest.approx(np.mean([one.own[0] for one in devices]), abs=1e-4)


# --- one vector of both ---

vectors = st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3).map(
    lambda values: np.array(values, np.float32)
)


@given(vectors, vectors, vectors, st.floats(0.1, 5), st.sampled_from([1.0, 0.9, 0.0]))
def test_what_is_sent_is_option_two(
    own: np.ndarray, shared: np.ndarray, change: np.ndarray, reach: float, retained: float
) -> None:
    mine = Control(own, shared, 0.7, retained)
    trained = np.array([True, True, False])
    sent = mine.sent(change, reach, trained)
    after = own - shared - np.array([1, 1, 0]) * change / reach
    assert sent[:3] == pytest.approx(change)
    assert sent[3:] == pytest.approx(0.7 * (after - retained * own), abs=1e-5)
    assert mine.following(sent) == pytest.approx(after, abs=1e-5)


def test_at_first_the_change_is_as_long_as_the_update_of_an_ordinary_device() -> None:
    how = Training(learning_rate=0.2, momentum=0.6, control_steps=7)
    nothing, change = np.zeros(4, np.float32), np.arange(4, dtype=np.float32)
    sent = Control(nothing, nothing, control.scale(how), 1.0).sent(
        change, control.reach(7, how), ALL
    )
    assert sent[4:] == pytest.approx(-change)


def test_a_device_that_took_no_step_keeps_its_variate() -> None:
    own, shared = np.array([2.0], np.float32), np.array([5.0], np.float32)
    mine = Control(own, shared, 1.0, 1.0)
    assert mine.following(mine.sent(np.zeros(1, np.float32), 0.0, ALL)) == own


def test_clipping_leaves_the_hubs_variate_the_mean() -> None:
    the_plan = varied(plan_of(), training={"control_steps": 2}, privacy={"clip_norm": 0.5})
    spec = release.update_spec(the_plan, 0.5)
    rng, shared = np.random.default_rng(1), np.zeros(0, np.float32)
    owns = [np.zeros(5, np.float32)] * 3
    for _ in range(4):
        clipped = []
        for i, own in enumerate(owns):
            hubs = shared if len(shared) else np.zeros(5, np.float32)
            mine = Control(own, hubs, control.scale(the_plan.training), 1.0)
            sent = mine.sent(rng.normal(size=5).astype(np.float32), 0.3, ALL)
            assert update.norm(sent) > 0.5
            clipped.append(update.clipped(sent, spec))
            assert update.norm(clipped[-1]) <= 0.5
            owns[i] = mine.following(clipped[-1])
        _, shared = control.following(the_plan, np.mean(clipped, axis=0), shared, 1.0)
        assert shared == pytest.approx(np.mean(owns, axis=0), abs=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_noise_in_the_hubs_variate_fades(share: float) -> None:
    the_plan = varied(plan_of(noise=1.0), training={"control_steps": 1})
    factor, n = control.scale(the_plan.training), 3
    assert control.retained(the_plan) == control.RETAINED == 0.9
    own, shared = np.ones(n, np.float32), np.full(n, 3.0, np.float32)
    off = [shared - own]
    for _ in range(20):
        # As many devices as there are, all alike; ``share`` of them take part and come to 1 again.
        mine = Control(own, shared, factor, 0.9)
        change = (own - shared - 1.0) * np.float32(0.3)
        sent = mine.sent(change, 0.3, ALL)
        assert mine.following(sent) == pytest.approx(own, abs=1e-5)
        _, shared = control.following(the_plan, sent, shared, share)
        off.append(shared - own)
    wanted = 2.0 * (1 - 0.1 * share) ** np.arange(21)
    assert np.array(off) == pytest.approx(np.repeat(wanted[:, None], n, axis=1), abs=1e-4)


# --- beside Flower's baseline, and whole runs ---

STEPS = {"device-1": 2, "device-2": 4, "device-3": 8}


class Fewer(Blobs):
    """Blobs of which the device has so many batches of eight only; it may fail in a round."""

    def __init__(self, steps: int, *faults: int) -> None:
        self._rows, self._faults, self._calls = min(8 * steps, 60), faults, 0

    def load(self, data: Path, split: Split) -> Examples:
        self._calls += 1
        if self._calls in self._faults:
            raise OSError("the disk is gone")
        every = super().load(data, split)
        return Examples(every.x[: self._rows], every.y[: self._rows])


def controlled(mode: str = "plain", count: int = 3, **more: object) -> plan.Plan:
    how = {"control_steps": 4, "batch_size": 8, "server_momentum": 0.0, "averaged_rounds": 1}
    privacy = {**FINE, **more.pop("privacy", {})}
    return varied(plan_of(mode, count), training={**how, **more}, privacy=privacy)


def trio(folder: Path, *faults: int) -> Fleet:
    """Three devices of unequal steps, of which device-2 fails in the rounds given."""
    tasks: dict[str, Blobs] = {name: Fewer(steps) for name, steps in STEPS.items()}
    tasks["device-2"] = Fewer(STEPS["device-2"], *faults)
    return fleet(folder, 3, tasks)


def their_training(
    weights: np.ndarray, examples: Examples, rate: float, seed: int, correction: np.ndarray
) -> np.ndarray:
    """A step of torch's SGD and then one against the correction, as ``niid_bench`` does it."""
    model, places = Blobs().model(0), parameters.trained(Blobs().model(0))
    parameters.unflatten(model, weights)
    theirs = torch.optim.SGD(model.parameters(), lr=rate)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.split(torch.randperm(len(y)), 8)
    for batch in order:
        theirs.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        theirs.step()
        for name, parameter in model.named_parameters():
            piece = torch.from_numpy(correction[places[name]]).reshape(parameter.shape)
            parameter.data.add_(piece, alpha=-rate)
    return parameters.flatten(model)


@pytest.mark.parametrize("server_rate", [1.0, 0.5])
def test_rounds_end_where_flowers_baseline_ends(tmp_path: Path, server_rate: float) -> None:
    the_plan = controlled(momentum=0.0, server_learning_rate=server_rate)
    done = trio(tmp_path).run(the_plan)
    x = parameters.flatten(Blobs().model(the_plan.seed))
    c, owns = np.zeros_like(x), {name: np.zeros_like(x) for name in STEPS}
    gradients = np.zeros(len(x), np.bool_)
    for place in parameters.trained(Blobs().model(0)).values():
        gradients[place] = True
    assert 0 < np.count_nonzero(gradients) < len(x)  # batch norm's statistics have none
    rate = the_plan.training.learning_rate
    for number in (1, 2, 3):
        changes, moved = [], []
        for name, steps in STEPS.items():
            examples = Fewer(steps).load(tmp_path / name, "train")
            seed = training.local_seed(the_plan.seed, "run", number, name)
            y = their_training(x, examples, rate, seed, c - owns[name])
            new = owns[name] - c + 1.0 / (rate * steps) * (x - y)
            new = np.where(gradients, new, 0).astype(np.float32)
            changes.append(y - x)
            moved.append(new - owns[name])
            owns[name] = new
        rates = np.where(gradients, server_rate, 1.0)
        x = (x + rates * np.mean(changes, axis=0)).astype(np.float32)
        c = (c + np.mean(moved, axis=0)).astype(np.float32)
    assert done.weights == pytest.approx(x, abs=1e-4)
    plain = trio(tmp_path / "plain").run(
        varied(the_plan, training={"control_steps": None, "server_learning_rate": server_rate})
    )
    assert np.abs(plain.weights - x).max() > 0.01


@pytest.mark.parametrize("mode", ["he", "secagg"])
def test_a_hidden_sum_controls_as_a_plain_one(tmp_path: Path, mode: str) -> None:
    def run(how: str) -> np.ndarray:
        the_plan = controlled(
            how, strategy="fedyogi", weighting="capped", weight_cap=40, privacy={"clip": "adaptive"}
        )
        return trio(tmp_path / how, 2).run(the_plan).weights

    assert np.array_equal(run(mode), run("plain"))


def owns_of(here: Fleet, checkpoints: Checkpoints) -> tuple[np.ndarray, np.ndarray]:
    counted, control_ = checkpoints.load("run").counted, checkpoints.load("run").control
    apps = [here.grid._apps[member.node_id] for member in here.cohort.members.values()]
    own = [
        Carried(_kept(app), "run", local_update.CONTROL).as_of(
            counted[name], lambda: np.zeros_like(control_)
        )
        for name, app in zip(here.cohort.members, apps, strict=True)
    ]
    return np.array(own), control_


def _kept(app: object) -> KeptHere:
    """What a device keeps, out of the closure of its app."""
    contribute = app._registered_funcs["train.default"]
    while contribute.__closure__:
        cells = [cell.cell_contents for cell in contribute.__closure__]
        for held in cells:
            if isinstance(held, KeptHere):
                return held
        contribute = next(held for held in cells if callable(held) and hasattr(held, "__closure__"))
    raise AssertionError("it keeps nothing")


@pytest.mark.parametrize("mode", ["plain", "secagg"])
def test_a_term_that_did_not_count_leaves_the_variate_as_it_was(tmp_path: Path, mode: str) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    here = trio(tmp_path, 2, 3)
    reports: list[RoundReport] = []
    here.run(controlled(mode, count=4), on_round=reports.append, checkpoints=checkpoints)
    assert [len(report.survivors) for report in reports] == [3, 2, 2, 3]
    own, shared = owns_of(here, checkpoints)
    assert np.abs(own).max() > 0.01
    assert shared == pytest.approx(own.mean(axis=0), abs=1e-4)


def test_a_round_thrown_away_is_forgotten_by_those_who_trained_in_it(tmp_path: Path) -> None:
    tasks: dict[str, Blobs] = {"device-1": Fewer(2, 2), "device-2": Fewer(4, 2)}
    here, checkpoints = fleet(tmp_path, 3, tasks), Checkpoints(tmp_path / "run")
    here.run(controlled(count=3), checkpoints=checkpoints)
    own, shared = owns_of(here, checkpoints)
    assert shared == pytest.approx(own.mean(axis=0), abs=1e-4)


def test_a_run_taken_up_again_ends_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    undisturbed = trio(tmp_path / "a", 3).run(controlled(count=4))
    here, checkpoints = trio(tmp_path / "b", 3), Checkpoints(tmp_path / "run")

    def stop(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.run(controlled(count=4), on_round=stop, checkpoints=checkpoints)
    assert checkpoints.load("run").control.any()
    done = here.run(controlled(count=4), checkpoints=checkpoints)
    assert np.array_equal(done.weights, undisturbed.weights)


def test_noise_is_on_both_parts_and_charged_once(tmp_path: Path) -> None:
    the_plan = controlled(privacy={"noise_multiplier": 1.0, "clip_norm": 1.0})
    spec = release.update_spec(the_plan, 1.0)
    assert (spec.riders, spec.multiplier) == (0, 1.0)
    n = len(parameters.flatten(Blobs().model(0)))
    assert release.values(the_plan, n) == 2 * n
    checkpoints = Checkpoints(tmp_path / "run")
    charged: list[int] = []
    trio(tmp_path).run(the_plan, charge=charged.append, checkpoints=checkpoints)
    assert charged == [1, 2, 3]
    untrained = ~parameters.mask(Blobs().model(0))
    assert checkpoints.load("run").control[untrained].all()  # nothing but noise is there


def test_a_term_of_twice_the_length_has_to_fit_its_bits(tmp_path: Path) -> None:
    with pytest.raises(BadParameters, match=r"raise privacy\.bits"):
        trio(tmp_path).run(controlled(privacy={"bits": 4}))
    trio(tmp_path / "b").run(controlled(privacy={"bits": 4}, control_steps=None, count=1))


class Smooth(Fewer):
    """Without statistics of batches, so that single examples can be protected."""

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Linear(2, 2)


def test_steps_that_protect_examples_are_corrected_too(tmp_path: Path) -> None:
    examples, how = Blobs().load(write(tmp_path, 3), "train"), Training(learning_rate=0.1)
    start = parameters.flatten(Smooth(1).model(1))
    correction = np.linspace(-2, 2, len(start), dtype=np.float32)
    done = example_privacy.descend(
        Smooth(1).model(2),
        start,
        examples,
        how,
        ExamplePrivacy(noise_multiplier=1.0, clip_norm=100.0, sampling_rate=1.0, steps=6),
        batches=[np.arange(60)] * 6,
        noise=lambda count: np.zeros(count, np.int64),
        seed=0,
        correction=correction,
    )
    full = Training(local_epochs=6, batch_size=60, learning_rate=0.1)
    wanted = training.train(Smooth(1).model(2), start, examples, full, 1, correction=correction)
    assert done.weights == pytest.approx(wanted.weights, abs=2e-4)
    assert np.abs(wanted.weights - start).max() > 0.1


def test_variates_of_protected_examples_have_the_hubs_as_their_mean(tmp_path: Path) -> None:
    tasks: dict[str, Blobs] = {name: Smooth(steps) for name, steps in STEPS.items()}
    here, checkpoints = fleet(tmp_path, 3, tasks), Checkpoints(tmp_path / "run")
    protected = ExamplePrivacy(noise_multiplier=1.0, clip_norm=1.0, sampling_rate=0.5, steps=4)
    the_plan = controlled(privacy={"examples": protected})
    here.run(the_plan, checkpoints=checkpoints, task=Smooth(1))
    own, shared = owns_of(here, checkpoints)
    assert np.abs(own).max() > 0.01
    assert shared == pytest.approx(own.mean(axis=0), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("[training]\ncontrol_steps = 0", "control_steps"),
        ("[training]\ncontrol_steps = 3\nmomentum = 1.0", "never lets a gradient go"),
        ("[training]\ncontrol_steps = 3\nproximal = 0.1", "reckons with neither"),
        ("[training]\ncontrol_steps = 3\nstep_cap = 9", "reckons with neither"),
        (
            (
                '[training]\ncontrol_steps = 3\n[privacy]\nmode = "plain"\n[aggregation]\n'
                'rule = "median"\nbyzantine = 1\n[cohort]\nmin_devices = 5'
            ),
            "leave training.control_steps out",
        ),
    ],
)
def test_a_plan_refuses_what_makes_no_sense(fields: str, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        plan.loads(f'name = "p"\ntask = "t"\nmodel = "m"\n{fields}\n')
