"""Layers that stay on devices, parts of a model that train, adapters: what travels and what not."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from blobs import Blobs, write
from cohorts import Fleet, fleet, plan_of
from hypothesis import given
from hypothesis import strategies as st
from overheard import Overheard
from torch import nn

from atoll.federation import (
    client_app,
    layout,
    lora,
    messages,
    parameters,
    personal,
    plan,
    rounds,
    training,
)
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.errors import BadMessage, BadPlan, RoundFailed
from atoll.federation.evaluation import evaluate
from atoll.federation.kept import Carried, Kept, KeptHere
from atoll.federation.plan import Layers, Plan, Training
from atoll.federation.task import Examples, Split
from atoll.privacy import frames
from atoll.privacy.errors import BadUpdate, Refused
from atoll.privacy.plain import PlainParty
from atoll.privacy.sums import CONTRIBUTE, PartySum, RoundKey

# The model of Blobs: 0 Linear(2, 8), 1 BatchNorm1d(8), 2 ReLU, 3 Linear(8, 2).
SIZES = {"0": 24, "1": 32, "3": 18}
HEAD, NORM = Layers(local=("3.*",)), Layers(local=("batchnorm",))
ADAPTED = Layers(lora_layers=("0", "3"), lora_rank=1, lora_alpha=4.0)


def layered(layers: Layers, mode: str = "plain", count: int = 3, **training: object) -> Plan:
    made = plan_of(mode, count=count)
    return msgspec.structs.replace(
        made, layers=layers, training=msgspec.structs.replace(made.training, **training)
    )


class Contrary(Blobs):
    """Devices of an odd seed call left what the others call right: no one head suits all."""

    def load(self, data: Path, split: Split) -> Examples:
        good = super().load(data, split)
        return Examples(good.x, good.y ^ (int((data / "seed").read_text()) % 2))


class Scaled(Blobs):
    """Each device measures in a unit, and from a zero, of its own."""

    def load(self, data: Path, split: Split) -> Examples:
        good, seed = super().load(data, split), int((data / "seed").read_text())
        return Examples(good.x * np.float32(10.0**seed) + np.float32(seed * 100), good.y)


class Another(Blobs):
    """Begins with weights of its own, as another version of a task may."""

    def model(self, seed: int) -> nn.Module:
        return super().model(seed + 1)


def everyone(task: Blobs, devices: int) -> dict[str, Blobs]:
    return {f"device-{number}": task for number in range(1, devices + 1)}


def own(kept: Kept, layers: Layers, task: Blobs | None = None) -> np.ndarray:
    mine = personal.Mine.of(task or Blobs(), 7, layout.encode(layers), "", kept, "run")
    return mine.latest()


def share(replies: Mapping[str, messages.EvaluateReply]) -> float:
    return sum(one.correct for one in replies.values()) / sum(one.rows for one in replies.values())


def scores(here: Fleet, the_plan: Plan, weights: np.ndarray) -> dict[str, messages.EvaluateReply]:
    return evaluate(here.of(the_plan), weights)


def test_without_layers_all_weights_travel_as_ever() -> None:
    made = layout.of(Blobs(), 3)
    assert np.array_equal(made.initial, parameters.flatten(Blobs().model(3)))
    assert made.counts() == {"travelling": 74, "local": 0, "frozen": 0}
    assert (made.frozen, layout.encode(Layers())) == ("", "")
    assert all(parameter.requires_grad for parameter in made.model.parameters())


@pytest.mark.parametrize(
    ("layers", "travelling", "local", "statistics"),
    [
        (HEAD, 24 + 32, 18, 16),
        (NORM, 24 + 18, 32, 16),
        (Layers(trained=("3.*",)), 18, 0, 0),
        (Layers(trained=("3.*", "0.*"), local=("3.bias",)), 24 + 16, 2, 0),
        (ADAPTED, (2 + 8) + (8 + 2), 0, 0),
        (Layers(lora_layers=("0",), lora_rank=1, trained=("1.*",)), 10 + 32, 0, 16),
        (Layers(lora_layers=("0",), lora_rank=1, local=("3.*",)), 10, 18, 0),
    ],
)
def test_patterns_say_what_travels_what_stays_and_what_is_frozen(
    layers: Layers, travelling: int, local: int, statistics: int
) -> None:
    made = layout.of(Blobs(), 3, layers)
    frozen = made.start.size - travelling - local
    assert made.counts() == {"travelling": travelling, "local": local, "frozen": frozen}
    assert bool(made.frozen) == (frozen > 0)
    wanted = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    assert wanted == travelling + local - statistics


@given(st.sampled_from([HEAD, NORM, ADAPTED, Layers(trained=("0.*",), local=("1.*",))]))
def test_all_weights_are_their_parts(layers: Layers) -> None:
    made = layout.of(Blobs(), 3, layers)
    rng = np.random.default_rng(0)
    sent = rng.normal(size=made.counts()["travelling"]).astype(np.float32)
    local = rng.normal(size=made.counts()["local"]).astype(np.float32)
    whole = made.whole(sent, local)
    assert np.array_equal(made.travelling(whole), sent)
    assert np.array_equal(made.local(whole), local)
    assert np.count_nonzero(whole != made.start) <= sent.size + local.size
    assert np.array_equal(made.whole(made.initial), made.start)
    assert np.array_equal(made.local(made.whole(sent, local[1:])), made.local(made.start))
    with pytest.raises(BadMessage, match="do not fit"):
        made.whole(sent[1:])


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (Layers(local=("tail.*",)), "layers.local: 'tail.*' names nothing"),
        (Layers(trained=("3.weights",)), "layers.trained: '3.weights' names nothing"),
        (Layers(local=("*",)), "keeps all that is trained"),
        (Layers(lora_layers=("1",), lora_rank=1), "layers.lora_layers: .* there are 0, 3"),
        (Layers(lora_layers=("0",), lora_rank=2), "not below the rank"),
        (Layers(lora_layers=("0",), lora_rank=1, trained=("0.bias",)), "not in both"),
    ],
)
def test_layers_that_cannot_be_are_refused(layers: Layers, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        layout.of(Blobs(), 3, layers)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora_rank = 4", "belong together"),
        ('lora_layers = ["0"]', "belong together"),
        ("lora_alpha = 4.0", "there are none"),
        ("fine_tune_epochs = 0", "fine_tune_epochs"),
        ("locals = []", "locals"),
    ],
)
def test_a_plans_layers_are_checked(text: str, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        plan.loads(f'name = "p"\ntask = "t"\nmodel = "m"\n[layers]\n{text}\n')


def test_layers_survive_the_wire_and_nonsense_is_refused() -> None:
    for layers in (Layers(), HEAD, ADAPTED, Layers(fine_tune=("3.*",), fine_tune_epochs=4)):
        assert layout.decode(layout.encode(layers)) == layers
    for text in ("{", "[]", '{"local": "head"}', '{"other": 1}', '{"lora_rank": 2}'):
        with pytest.raises(BadMessage):
            layout.decode(text)


@pytest.mark.parametrize("layers", [HEAD, NORM])
@pytest.mark.parametrize("mode", ["plain", "secagg"])
def test_layers_that_stay_are_in_no_message(tmp_path: Path, layers: Layers, mode: str) -> None:
    kept = {f"device-{number}": KeptHere() for number in (1, 2, 3)}
    here = fleet(tmp_path, 3, kept=kept, grid=Overheard)
    the_plan = layered(layers, mode)
    done = here.run(the_plan)
    scores(here, the_plan, done.weights)
    assert isinstance(here.grid, Overheard)
    start = layout.of(Blobs(), 7, layers)
    stayed = [own(one, layers) for one in kept.values()]
    assert all(not np.array_equal(one, start.local(start.start)) for one in stayed)
    # Eight bytes are two weights in a row; ones and zeros, where normalisation begins, are common.
    secret = {
        one[at : at + 2].tobytes()
        for one in stayed
        for at in range(one.size - 1)
        if len(set(one[at : at + 2].tolist()) - {0.0, 1.0}) == 2
    }
    assert len(secret) > 20
    for message in here.grid.everything:
        assert not any(pair in message for pair in secret)
    sent = start.counts()["travelling"]
    assert {len(one) for one in here.grid.down if len(one) in (74 * 4, sent * 4)} == {sent * 4}


def test_a_head_of_their_own_serves_devices_that_disagree(tmp_path: Path) -> None:
    task = Contrary()
    shared = fleet(tmp_path / "a", 4, everyone(task, 4))
    common = layered(Layers(), count=5)
    assert share(scores(shared, common, shared.run(common, task=task).weights)) < 0.75
    here = fleet(tmp_path / "b", 4, everyone(task, 4))
    personalised = layered(HEAD, count=5)
    done = here.run(personalised, task=task)
    assert share(scores(here, personalised, done.weights)) > 0.9
    # Whoever has no head of its own yet evaluates with the one that everybody began with.
    name, data = "device-9", write(tmp_path / "b" / "device-9", 9)
    fresh = messages.EvaluateAsk(
        task="blobs",
        weights=parameters.to_bytes(done.weights),
        split="test",
        run="run",
        seed=7,
        layers=layout.encode(HEAD),
    )
    made = layout.of(task, 7, HEAD)
    alone = training.evaluate(made.model, made.whole(done.weights), task.load(data, "test"))
    assert personal.evaluate(task, data, fresh, KeptHere(), tune=False).correct == alone.correct, (
        name
    )


def test_normalisation_of_their_own_keeps_each_devices_statistics(tmp_path: Path) -> None:
    kept = {f"device-{number}": KeptHere() for number in (1, 2, 3)}
    here = fleet(tmp_path, 3, everyone(Scaled(), 3), kept=kept)
    the_plan = layered(NORM, count=14)
    done = here.run(the_plan, task=Scaled())
    assert share(scores(here, the_plan, done.weights)) > 0.9
    spread = [own(one, NORM)[24:].max() for one in kept.values()]  # running variances
    assert spread[0] * 10 < spread[1] < spread[2] / 10


def test_a_round_begins_with_the_layers_of_the_last_one_and_again_the_same_when_repeated() -> None:
    kept = KeptHere()
    mine = personal.Mine.of(Blobs(), 7, layout.encode(HEAD), "", kept, "run")
    start = mine.layout.start
    assert np.array_equal(mine.before(1), mine.layout.local(start))
    mine.keep(1, mine.before(1), start + 1)
    # Whether the round counted is nothing to them: they are no part of its sum.
    assert np.array_equal(mine.before(2), mine.layout.local(start) + 1)
    assert np.array_equal(mine.before(1), mine.layout.local(start))
    other = Layers(local=("0.weight", "3.bias"))
    assert np.array_equal(
        personal.Mine.of(Blobs(), 7, layout.encode(other), "", kept, "run").latest(),
        layout.of(Blobs(), 7, other).local(start),
    )


def test_layers_that_diverged_are_not_kept() -> None:
    kept = KeptHere()
    mine = personal.Mine.of(Blobs(), 7, layout.encode(HEAD), "", kept, "run")
    before = mine.before(1)
    with pytest.raises(BadUpdate):
        mine.keep(1, before, np.full_like(mine.layout.start, np.inf))
    assert np.array_equal(mine.latest(), before)


def test_control_variates_are_of_what_travels(tmp_path: Path) -> None:
    """With everything local to a head kept out, SCAFFOLD runs over the rest, in every mode."""
    made = layered(HEAD, count=3, control_steps=4)
    kept = {f"device-{number}": KeptHere() for number in (1, 2, 3)}
    checkpoints = Checkpoints(tmp_path / "run")
    done = fleet(tmp_path / "a", 3, kept=kept).run(made, checkpoints=checkpoints)
    hidden = fleet(tmp_path / "b", 3).run(layered(HEAD, "secagg", count=3, control_steps=4))
    assert np.array_equal(done.weights, hidden.weights)
    state = checkpoints.load("run")
    assert state is not None
    own = [
        Carried(one, "run", "control").as_of(3, lambda: np.zeros(56, np.float32))
        for one in kept.values()
    ]
    assert {one.shape for one in own} == {(56,)}
    # All took part from the first round on, so the hub's is the mean, but for rounding.
    np.testing.assert_allclose(np.mean(own, axis=0), state.control, atol=2e-3)
    assert np.abs(state.control).max() > 0.05


class BrokenOff(Blobs):
    """Ends the hub's process, as it were, in the middle of round 2."""

    calls = 0

    def load(self, data: Path, split: Split) -> Examples:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().load(data, split)


def test_a_round_that_broke_off_is_repeated_exactly_with_layers_that_stay(tmp_path: Path) -> None:
    undisturbed = fleet(tmp_path / "a", 3).run(layered(HEAD))
    here = fleet(tmp_path / "b", 3, {"device-3": BrokenOff()})
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        here.run(layered(HEAD), checkpoints=checkpoints)
    done = here.run(layered(HEAD), checkpoints=checkpoints)
    assert np.array_equal(done.weights, undisturbed.weights)


@pytest.mark.parametrize("layers", [HEAD, NORM, ADAPTED, Layers(trained=("3.*",))])
def test_all_modes_come_to_the_same_weights(tmp_path: Path, layers: Layers) -> None:
    found = [
        fleet(tmp_path / mode, 3).run(layered(layers, mode, count=2)).weights
        for mode in ("plain", "he", "secagg")
    ]
    assert found[0].size == layout.of(Blobs(), 7, layers).counts()["travelling"]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    "layers", [Layers(trained=("0.*", "3.*")), ADAPTED], ids=["a part", "adapters"]
)
def test_what_is_frozen_stays_and_the_rest_learns(tmp_path: Path, layers: Layers) -> None:
    here = fleet(tmp_path, 3)
    the_plan = layered(layers, count=8, learning_rate=0.3)
    made = layout.of(Blobs(), 7, layers)
    replies = evaluate(here.of(the_plan, frozen=made.frozen), here.run(the_plan).weights)
    assert share(replies) > 0.9
    before = made.model.state_dict()["1.running_mean"].clone()
    done = training.train(
        made.model, made.start, Blobs().load(tmp_path / "device-1", "train"), Training(), 1
    )
    changed = done.weights != made.start
    assert changed.any()
    assert not changed[~made._travels].any()
    assert torch.equal(made.model.state_dict()["1.running_mean"], before)


def test_normalisation_that_is_trained_learns_and_what_is_frozen_does_not() -> None:
    model = Blobs().model(0)
    training.learning(model)
    assert all(layer.training for layer in model.modules())
    for parameter in model[1].parameters():
        parameter.requires_grad_(requires_grad=False)
    training.learning(model)
    assert [layer.training for layer in model] == [True, False, True, True]


def test_a_device_with_another_frozen_part_does_not_take_part(tmp_path: Path) -> None:
    here, reports = fleet(tmp_path, 3, {"device-2": Another()}), []
    here.run(layered(Layers(trained=("3.*",)), count=1), on_round=reports.append)
    assert reports[0].survivors == ("device-1", "device-3")
    assert "same version of the task" in reports[0].dropped["device-2"]
    # Where all that differs is sent anyway, nobody minds.
    here.run(layered(Layers(), count=1), run="again", on_round=reports.append)
    assert len(reports[1].survivors) == 3


def test_layers_that_a_model_lacks_end_a_run_with_the_reason(tmp_path: Path) -> None:
    here, reports = fleet(tmp_path, 2), []
    with pytest.raises(BadPlan, match="names nothing"):
        here.run(layered(Layers(local=("tail",))))
    wrong = msgspec.structs.replace(layered(Layers()), layers=Layers(local=("3.*",)))
    with pytest.raises(RoundFailed):
        # As from a hub that sends what its own plan does not say.
        rounds_of(here, wrong, reports)
    assert "do not fit" in reports[0].dropped["device-1"]


def rounds_of(here: Fleet, the_plan: Plan, reports: list) -> None:
    run = here.of(the_plan, on_round=reports.append)
    rounds.run_rounds(run, parameters.flatten(Blobs().model(7)))


# --- adapters ---------------------------------------------------------------------------------


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 6, 5, padding=2, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv1d(6, 4, 3, stride=2, dilation=2),
        )
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)).mean(dim=2))


class Task(Blobs):
    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Convolving()


LORA = Layers(lora_layers=("body.*", "head"), lora_rank=2, lora_alpha=3.0)


def test_an_adapted_model_begins_as_the_plain_one_and_ends_as_what_is_exported() -> None:
    made, x = layout.of(Task(), 3, LORA), torch.randn(7, 3, 20)
    plain = Task().model(3).eval()
    assert torch.equal(made.model.eval()(x), plain(x))
    moved = made.initial + np.random.default_rng(1).normal(size=made.initial.size).astype("f4") / 3
    exported = made.exported(moved).eval()
    assert {name: v.shape for name, v in exported.state_dict().items()} == {
        name: v.shape for name, v in plain.state_dict().items()
    }
    torch.testing.assert_close(exported(x), made.model.eval()(x))
    assert not torch.allclose(exported(x), plain(x), atol=0.01)
    for name in ("norm.weight", "head.bias", "body.0.bias", "norm.running_var"):
        assert torch.equal(exported.state_dict()[name], plain.state_dict()[name])


def test_what_an_adapter_adds_is_the_papers_product() -> None:
    made = layout.of(Task(), 3, LORA)
    adapter = made.model.get_submodule("head")
    assert isinstance(adapter, lora.Adapted)
    down, up = torch.randn(2, 4), torch.randn(5, 2)
    adapter.down.weight.data, adapter.up.weight.data = down, up
    weights = made.travelling(parameters.flatten(made.model))
    added = made.exported(weights).state_dict()["head.weight"] - Task().model(3).head.weight
    torch.testing.assert_close(added.detach(), 3.0 / 2 * up @ down)
    assert torch.linalg.matrix_rank(added) == 2


def test_the_same_seed_gives_the_same_adapters_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    one = layout.of(Blobs(), 3, ADAPTED).initial
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert np.array_equal(one, layout.of(Blobs(), 3, ADAPTED).initial)
    assert not np.array_equal(one, layout.of(Blobs(), 4, ADAPTED).initial)


def test_only_adapters_travel(tmp_path: Path) -> None:
    here, reports = fleet(tmp_path, 3, grid=Overheard), []
    everything = fleet(tmp_path / "all", 3)
    here.run(layered(ADAPTED, count=1), on_round=reports.append)
    everything.run(layered(Layers(), count=1), on_round=reports.append)
    # For each device four bytes a weight down, besides what both runs say alike, and two up.
    assert reports[1].bytes_down - reports[0].bytes_down == 3 * 4 * (74 - 20)
    head = frames.address(RoundKey("run", 1), CONTRIBUTE, "device-1")
    assert reports[0].bytes_up == 3 * len(frames.pack(head, [bytes(2 * 20)]))
    assert reports[0].bytes_up < reports[1].bytes_up
    assert isinstance(here.grid, Overheard)
    frozen = layout.of(Blobs(), 7).start[:24]
    assert not any(
        frozen[at : at + 2].tobytes() in message
        for at in range(23)
        for message in here.grid.everything
    )


def test_examples_are_protected_through_adapters(tmp_path: Path) -> None:
    """DP-SGD with adapters, against the same computed without Opacus, noise aside."""
    from atoll.federation import example_privacy
    from atoll.federation.plan import ExamplePrivacy

    class Linear(Blobs):
        def model(self, seed: int) -> nn.Module:
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))

    made = layout.of(Linear(), 3, Layers(lora_layers=("0", "2"), lora_rank=1))
    moved = made.start + np.float32(0.1) * made._travels
    examples = Blobs().load(write(tmp_path / "one", 1), "train")
    done = example_privacy.descend(
        made.model,
        moved,
        examples,
        Training(learning_rate=1.0, momentum=0.0),
        ExamplePrivacy(1.0, 0.05, 1.0, 1),
        batches=[np.arange(4)],
        noise=lambda count: np.zeros(count, np.int64),
        seed=1,
    )
    steps = []
    for row in range(4):
        fresh = layout.of(Linear(), 3, Layers(lora_layers=("0", "2"), lora_rank=1))
        parameters.unflatten(fresh.model, moved)
        loss = nn.functional.cross_entropy(
            fresh.model(torch.from_numpy(examples.x[row : row + 1])),
            torch.from_numpy(examples.y[row : row + 1]),
        )
        loss.backward()
        flat = [p.grad.flatten() for p in fresh.model.parameters() if p.requires_grad]
        gradient = torch.cat(flat).numpy()
        steps.append(gradient * min(1, 0.05 / np.linalg.norm(gradient)))
    names = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert all(name.split(".")[1] in ("down", "up") for name in names)
    expected = -np.sum(steps, axis=0) / len(examples.y)
    assert np.allclose((done.weights - moved)[made._travels], expected, atol=1e-4)
    assert np.array_equal(done.weights[~made._travels], moved[~made._travels])


# --- fine-tuning ------------------------------------------------------------------------------


def test_a_fine_tuned_head_is_told_beside_the_global_one(tmp_path: Path) -> None:
    task = Contrary()
    here = fleet(tmp_path, 4, everyone(task, 4))
    tuned = Layers(fine_tune=("3.*",), fine_tune_epochs=5)
    the_plan = layered(tuned, count=4)
    done = here.run(the_plan, task=task)
    replies = scores(here, the_plan, done.weights)
    assert share(replies) < 0.75
    assert sum(one.correct_tuned for one in replies.values()) / 240 > 0.9
    plainly = scores(here, layered(Layers(), count=4), done.weights)
    assert {name: one.correct for name, one in plainly.items()} == {
        name: one.correct for name, one in replies.items()
    }
    assert {one.correct_tuned for one in plainly.values()} == {-1}


def test_accuracy_between_rounds_is_that_of_devices_with_their_own_layers(tmp_path: Path) -> None:
    task, reports = Contrary(), []
    here = fleet(tmp_path, 4, everyone(task, 4))
    layers = Layers(local=("3.*",), trained=("0.*", "3.*"), fine_tune=("3.*",))
    the_plan = msgspec.structs.replace(
        layered(layers, count=4, learning_rate=0.3), evaluate_every=2
    )
    done = here.run(the_plan, task=task, on_round=reports.append)
    told = [one.accuracy for one in reports if one.accuracy is not None]
    assert len(told) == 2
    frozen = layout.of(task, 7, layers).frozen
    last = evaluate(here.of(the_plan, frozen=frozen), done.weights)
    assert told[-1] == pytest.approx(share(last))
    assert told[-1] > 0.85


def test_fine_tuning_leaves_what_the_device_carries_alone(tmp_path: Path) -> None:
    kept = KeptHere()
    here = fleet(tmp_path, 3, kept={"device-1": kept})
    layers = Layers(local=("3.*",), fine_tune=("3.*",))
    the_plan = layered(layers, count=2)
    done = here.run(the_plan)
    before = own(kept, layers)
    scores(here, the_plan, done.weights)
    assert np.array_equal(own(kept, layers), before)
    assert Carried(kept, "run", "residual").as_of(0, lambda: np.zeros(1, np.float32)).size == 1


class Testing(Blobs):
    """Has held-back examples alone."""

    def load(self, data: Path, split: Split) -> Examples:
        good = super().load(data, split)
        return Examples(good.x[:0], good.y[:0]) if split == "train" else good


def test_a_device_without_examples_to_tune_on_evaluates_all_the_same(tmp_path: Path) -> None:
    ask = messages.EvaluateAsk(
        task="blobs",
        weights=parameters.to_bytes(parameters.flatten(Blobs().model(7))),
        split="test",
        layers=layout.encode(Layers(fine_tune=("3.*",))),
    )
    reply = personal.evaluate(Testing(), write(tmp_path / "one", 1), ask, KeptHere(), tune=True)
    assert (reply.rows, reply.correct_tuned) == (60, -1)


@pytest.mark.parametrize("floor", [client_app.NO_FLOOR, client_app.Floor(devices=2)])
def test_a_device_that_trusts_no_hub_tells_nothing_of_a_tuned_model(
    tmp_path: Path, floor: client_app.Floor
) -> None:
    """Without --allow-plain, or with a floor, what its training examples make of a model stays."""
    closed = floor == client_app.NO_FLOOR

    def sums(_: str, party: PartySum) -> PartySum:
        if closed and isinstance(party, PlainParty):
            raise Refused("not in the clear")
        return party

    here = fleet(tmp_path, 3, sums=sums, floors=dict.fromkeys(everyone(Blobs(), 3), floor))
    asked = msgspec.structs.replace(plan_of("secagg"), layers=Layers(fine_tune=("3.*",)))
    weights = parameters.flatten(Blobs().model(asked.seed))
    replies = scores(here, asked, weights)
    assert {one.correct_tuned for one in replies.values()} == {-1}
    assert {one.rows for one in replies.values()} == {60}


@pytest.mark.parametrize("section", ["noise_multiplier = 1.0", "examples = {examples}"])
def test_fine_tuning_is_refused_where_noise_promises_more(section: str) -> None:
    examples = "{ noise_multiplier = 1.0, clip_norm = 1.0, sampling_rate = 0.1, steps = 3 }"
    text = (
        'name = "a"\ntask = "a"\nmodel = "a"\n[layers]\nfine_tune = ["3.*"]\n[privacy]\n'
        + section.replace("{examples}", examples)
    )
    with pytest.raises(BadPlan, match="fine_tune"):
        plan.loads(text)


def test_a_round_that_is_refused_leaves_nothing_on_the_device(tmp_path: Path) -> None:
    kept = KeptHere()

    def no_plain(_: str, party: PartySum) -> PartySum:
        raise Refused("not in the clear")

    here = fleet(tmp_path, 3, sums=no_plain, kept=dict.fromkeys(everyone(Blobs(), 3), kept))
    here.run(layered(Layers(local=("3.*",)), count=1))
    assert kept.load("run", personal.LOCAL) is None
