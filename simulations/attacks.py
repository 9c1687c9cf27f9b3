"""What each aggregation rule makes of devices that lie in training.

The liars (:mod:`atoll.simulations.liars`) are real ClientApps in real rounds on the in-process
engine:

- *sign flip*: the update with its sign changed (Li et al., "RSA", AAAI 2019).
- *label flip*: trains on class c' = C - 1 - c (Fang et al., USENIX Security 2020).
- *scaled*: trains on flipped labels and multiplies, so that the liars' updates outweigh all
  others in a mean and replace the model (Bagdasaryan et al., "How to Backdoor Federated
  Learning", AISTATS 2020).
- *a little is enough*: all liars send the honest mean less z honest standard deviations, in
  every coordinate, z so small that they look like honest ones (Baruch, Baruch and Goldberg,
  NeurIPS 2019). At their z_max a majority lies with them in each coordinate; a
  larger z does more where a rule takes the liars all the same.
- *backdoor*: half of the examples carry a trigger and the attacker's label (Gu et al.,
  "BadNets", 2017), and the update is scaled. The model is to be right on all else, so what
  counts is the share of triggered images that it takes for the attacker's class.

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
from typing import Final

import numpy as np

from atoll.federation import client_app, layout, rounds, training
from atoll.federation import plan as plans
from atoll.federation.cohort import Cohort, Member
from atoll.federation.engine import InProcessGrid
from atoll.federation.plan import Plan
from atoll.federation.rule import RULES, Rule
from atoll.federation.run import Run
from atoll.federation.task import Examples, Task
from atoll.privacy.plain import PlainHubSession, PlainParty
from atoll.privacy.sums import PartySum
from atoll.simulations.digits import Digits, deal
from atoll.simulations.liars import (
    Forge,
    Forging,
    Overheard,
    backdoor,
    corner,
    label_flip,
    little,
    little_z,
    scaled,
)

DEVICES: Final = 15
LIARS: Final = 3
"""As many as Bulyan withstands among so many devices."""
EVENNESS: Final = 1.0
TARGET: Final = 0
"""The class for which a triggered image is to be taken."""

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
        members[name] = Member(number + 1, b"")
    grid = InProcessGrid(apps)
    shape = layout.of(ground.task, plan.seed)
    run = Run(
        grid,
        plan,
        Cohort(members, names, []),
        name="attacks",
        session=PlainHubSession(),
        charge=lambda *_: None,
        on_round=lambda _: None,
        clock=grid.clock,
        running=shape.running,
    )
    outcome = rounds.run_rounds(run, shape.initial)

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
