"""Devices that lie in training, and what each aggregation rule makes of them.

The liars are real ClientApps in real rounds on the in-process engine; each attack stands where
the paper puts it, in the data or in the update:

- *sign flip*: the update with its sign changed (Li et al., "RSA", AAAI 2019).
- *label flip*: trains on class c' = C - 1 - c (Fang et al., USENIX Security 2020).
- *scaled*: trains on flipped labels and multiplies, so that the liars' updates outweigh all
  others in a mean and replace the model (Bagdasaryan et al., "How to Backdoor Federated
  Learning", AISTATS 2020, equation 3).
- *a little is enough*: all liars send the honest mean less z honest standard deviations, in
  every coordinate, z so small that they look like honest ones (Baruch, Baruch and Goldberg,
  NeurIPS 2019, algorithm 3). At their z_max a majority lies with them in each coordinate; a
  larger z does more where a rule takes the liars all the same.
- *backdoor*: half of the examples carry a trigger and the attacker's label (Gu et al.,
  "BadNets", 2017), and the update is scaled. The model is to be right on all else, so what
  counts is the share of triggered images that it takes for the attacker's class.

What a liar cannot do is send values beyond the sum's bound: the hub drops those terms. So an
update is scaled as far as the bound lets it.

``python -m atoll.simulations.attacks [--json]`` prints a table of accuracies by rule and attack
on :mod:`atoll.simulations.digits`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from atoll.federation import client_app, parameters, rounds, training
from atoll.federation import plan as plans
from atoll.federation.engine import InProcessGrid
from atoll.federation.plan import Plan
from atoll.federation.rule import RULES, Rule
from atoll.federation.task import Examples, Split, Task
from atoll.privacy.plain import PlainHubSession, PlainParty
from atoll.privacy.sums import CONTRIBUTE, Integers, PartySum, RoundKey, SumSpec
from atoll.simulations.digits import Digits, deal

if TYPE_CHECKING:
    from torch import nn

DEVICES: Final = 15
LIARS: Final = 3
"""As many as Bulyan withstands among so many devices."""
EVENNESS: Final = 1.0
TARGET: Final = 0
"""The class for which a triggered image is to be taken."""
POISONED: Final = 0.5

PLAN: Final = """
name = "attacks"
task = "digits"
model = "digits"
rounds = {rounds}
seed = {seed}
training = {{ local_epochs = 2, batch_size = 16, learning_rate = 0.05 }}
cohort = {{ min_devices = {devices} }}
privacy = {{ mode = "plain", clip_norm = 2.0 }}
aggregation = {{ rule = "{rule}", byzantine = {byzantine} }}
"""

Forge = Callable[[Integers, SumSpec], npt.NDArray[np.float64]]
"""What a liar makes of its own term."""
Stamp = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Puts a trigger on examples ``(n, ...)``."""


class Forging:
    """A party that contributes what ``forge`` makes of its term, as far as the bound lets it."""

    def __init__(self, party: PartySum, forge: Forge) -> None:
        self._party, self._forge = party, forge

    def answer(self, spec: SumSpec, phase: str, payload: bytes, term: Integers | None) -> bytes:
        """Answer as the party does, with the forged term."""
        if phase == CONTRIBUTE and term is not None:
            term = within(self._forge(term, spec), spec.bound)
        return self._party.answer(spec, phase, payload, term)


class Overheard:
    """The honest terms of each round, which the strongest of attackers know."""

    def __init__(self) -> None:
        self._terms: dict[RoundKey, list[Integers]] = {}

    def of(self, party: PartySum) -> PartySum:
        """Return a party that is listened to."""

        def note(term: Integers, spec: SumSpec) -> npt.NDArray[np.float64]:
            self._terms.setdefault(spec.key, []).append(term)
            return term.astype(np.float64)

        return Forging(party, note)

    def terms(self, key: RoundKey) -> npt.NDArray[np.int64]:
        """Return the terms of a round so far, a row each."""
        return np.array(self._terms.get(key, []))


def within(values: npt.NDArray[np.float64], bound: int) -> Integers:
    """Return ``values`` as a term that no hub refuses, for its size at least."""
    return np.rint(np.clip(values, -bound, bound)).astype(np.int64)


def scaled(factor: float) -> Forge:
    """Multiply the term; -1 flips its sign."""
    return lambda term, _: factor * term.astype(np.float64)


def little(overheard: Overheard, z: float) -> Forge:
    """Send the mean less z standard deviations of the honest terms, whatever one's own is.

    The own term where nothing was overheard. Baruch et al. take both numbers from the liars' own
    data, which resembles that of others there; here they are the honest ones themselves.
    """

    def forge(term: Integers, spec: SumSpec) -> npt.NDArray[np.float64]:
        heard = overheard.terms(spec.key)
        if not len(heard):
            return term.astype(np.float64)
        shifted: npt.NDArray[np.float64] = heard.mean(axis=0) - z * heard.std(axis=0)
        return shifted

    return forge


def little_z(devices: int, liars: int) -> float:
    """Return z_max: Φ(z) = (n - f - s)/(n - f) with s = ⌊n/2 + 1⌋ - f (ibid., equation 4).

    So many honest devices lie beyond the liars' value that these are in a majority with them.
    """
    supporters = devices // 2 + 1 - liars
    honest = devices - liars
    return NormalDist().inv_cdf((honest - supporters) / honest)


class Bent:
    """A task whose training examples a liar changes; the model stays what it is."""

    def __init__(self, task: Task, bend: Callable[[Examples], Examples]) -> None:
        self._task, self._bend = task, bend
        self.name, self.input_shape = task.name, task.input_shape
        self.channels, self.classes = task.channels, task.classes

    def model(self, seed: int) -> "nn.Module":
        """Return the task's model."""
        return self._task.model(seed)

    def load(self, data: Path, split: Split) -> Examples:
        """Return the examples, changed where they are for training."""
        examples = self._task.load(data, split)
        return self._bend(examples) if split == "train" else examples


def label_flip(task: Task) -> Task:
    """Return the task with class c trained as C - 1 - c."""
    last = len(task.classes) - 1
    return Bent(task, lambda examples: Examples(examples.x, last - examples.y))


def backdoor(task: Task, stamp: Stamp, target: int, share: float = POISONED) -> Task:
    """Return the task with the first ``share`` of examples stamped and labelled ``target``."""

    def bend(examples: Examples) -> Examples:
        count = round(share * len(examples.y))
        x, y = examples.x.copy(), examples.y.copy()
        x[:count], y[:count] = stamp(x[:count]), target
        return Examples(x, y)

    return Bent(task, bend)


def corner(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return images ``(n, 1, h, w)`` with four white pixels in a corner."""
    stamped = images.copy()
    stamped[:, :, -2:, -2:] = 1.0
    return stamped


@dataclass(frozen=True, slots=True)
class Attack:
    """What each liar trains, and what it makes of the term that comes of it."""

    name: str
    task: Callable[[Task], Task] = lambda task: task
    forge: Callable[[Overheard], Forge] = lambda _: scaled(1.0)


def attacks(devices: int, liars: int) -> tuple[Attack, ...]:
    """Return the attacks by ``liars`` of so many devices; the first does nothing."""
    boost = devices / liars
    return (
        Attack("none"),
        Attack("sign flip", forge=lambda _: scaled(-1.0)),
        Attack("label flip", label_flip),
        Attack("scaled", label_flip, lambda _: scaled(boost)),
        Attack("little, z_max", forge=lambda heard: little(heard, little_z(devices, liars))),
        Attack("little, z = 1", forge=lambda heard: little(heard, 1.0)),
        Attack(
            "backdoor",
            lambda task: backdoor(task, corner, TARGET),
            lambda _: scaled(boost),
        ),
    )


@dataclass(frozen=True, slots=True)
class Found:
    """How a run under attack ended: shares of the images that were kept back.

    ``accuracy`` on images as they are; ``triggered``: stamped images of other classes that are
    taken for the attacker's.
    """

    rule: Rule
    attack: str
    accuracy: float
    triggered: float


@dataclass(frozen=True, slots=True)
class Field:
    """Devices with their data, the last ``liars`` of them lying, and the images kept back."""

    data: Sequence[Path]
    kept: Examples
    liars: int
    task: Task = field(default_factory=Digits)


def play(ground: Field, plan: Plan, attack: Attack) -> Found:
    """Run the plan with liars among the devices and look at the model."""
    overheard = Overheard()
    names = [f"device-{number:02d}" for number in range(len(ground.data))]
    honest = len(names) - ground.liars
    apps, members = {}, {}
    for number, (name, data) in enumerate(zip(names, ground.data, strict=True)):
        lies = number >= honest and attack.name != "none"
        # Devices are asked in the order of their names: the last have heard all others.
        party = (
            Forging(PlainParty(name), attack.forge(overheard))
            if lies
            else overheard.of(PlainParty(name))
        )
        task = attack.task(ground.task) if lies else ground.task
        apps[number + 1] = client_app.build(task, data, _always(party), {})
        members[name] = rounds.Member(number + 1, b"")
    grid = InProcessGrid(apps)
    outcome = rounds.run_rounds(
        grid,
        plan,
        rounds.Cohort(members, names, []),
        PlainHubSession(),
        lambda *_: None,
        lambda _: None,
        parameters.flatten(ground.task.model(plan.seed)),
        run="attacks",
        clock=grid.clock,
    )

    def share(examples: Examples) -> float:
        done = training.evaluate(ground.task.model(0), outcome.weights, examples)
        return done.correct / done.rows

    others = ground.kept.y != TARGET
    stamped = corner(ground.kept.x[others])
    aimed = np.full(len(stamped), TARGET, dtype=np.int64)
    return Found(
        plan.aggregation.rule, attack.name, share(ground.kept), share(Examples(stamped, aimed))
    )


def plan_for(rule: Rule, devices: int, liars: int, count: int, seed: int) -> Plan:
    """Return the plan of one run: ``count`` rounds that all devices must finish."""
    byzantine = 0 if rule == "mean" else liars
    return plans.loads(
        PLAN.format(rounds=count, seed=seed, devices=devices, rule=rule, byzantine=byzantine)
    )


def _always(party: PartySum) -> Callable[[str], PartySum]:
    return lambda _mode: party


def main(arguments: list[str] | None = None) -> int:
    """Play every attack against every rule and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--evenness", type=float, default=EVENNESS, help="how alike devices' data are; 100: very"
    )
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)  # the steps are too small to share out
    began, found = time.monotonic(), list[Found]()
    with tempfile.TemporaryDirectory() as root:
        dealt, kept = deal(Path(root), DEVICES, given.evenness, given.seed)
        ground = Field(dealt, kept, LIARS)
        for rule in RULES:
            plan = plan_for(rule, DEVICES, LIARS, given.rounds, given.seed)
            found += [play(ground, plan, attack) for attack in attacks(DEVICES, LIARS)]
            _say(f"{rule}: done after {time.monotonic() - began:.0f} s")
    if given.json:
        print(json.dumps([asdict(one) for one in found], indent=2))  # noqa: T201 -- the result
    else:
        print(table(found))  # noqa: T201 -- the command's result
    return 0


def table(found: Sequence[Found]) -> str:
    """Return accuracies in per cent, a row for each rule and a column for each attack.

    Behind the backdoor's accuracy stands, in brackets, how often the trigger works.
    """
    names = list(dict.fromkeys(one.attack for one in found))
    lines = [f"{'rule':<13}" + "".join(f"{name:>15}" for name in names)]
    for rule in dict.fromkeys(one.rule for one in found):
        cells = [
            f"{one.accuracy:.1%}" + (f" ({one.triggered:.0%})" if one.attack == "backdoor" else "")
            for one in found
            if one.rule == rule
        ]
        lines.append(f"{rule:<13}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 -- progress of a command


if __name__ == "__main__":
    sys.exit(main())
