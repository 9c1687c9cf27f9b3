"""What the same network reaches when the recordings lie in one place, and without noise.

Two yardsticks beside the demo's run, from the same people, windows, network and seed:

- :func:`central` trains on everybody's windows together, which no hub could.
- :func:`federated_plain` runs the demo's plan through the in-process engine with plain sums
  and without noise.

``python -m atoll.simulations.reference --json`` prints both; progress goes to stderr. Anchor:
Burns et al. 2018 (arXiv 1802.01489v1) report 99.6 % on unseen windows of known people, by a
convolutional recurrent network, and 87.3 % on unseen people, by a random forest, for this
10-person set with cross-validation (:mod:`atoll.simulations.published` repeats it); one split
into eight and two people, as here, varies by several points with who the two are.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from atoll.federation import client_app, layout, parameters, rounds, training
from atoll.federation import plan as plans
from atoll.federation.cohort import Cohort, Member
from atoll.federation.engine import InProcessGrid
from atoll.federation.plan import Plan, Privacy
from atoll.federation.run import RoundReport, Run
from atoll.federation.task import Examples
from atoll.privacy import modes
from atoll.privacy.plain import PlainParty
from atoll.simulations.spar import PEOPLE, Spar, split_people

PLAN: Final = Path(__file__).with_name("spar.toml")
UNSEEN: Final = (9, 10)
CENTRAL_EPOCHS: Final = 20
COOLING: Final = 0.7
"""Share of central training after which the learning rate falls to a fifth."""

Say = Callable[[str], None]


class Accuracies(NamedTuple):
    """Shares of unseen windows that are right: of people who trained, and of those who did not."""

    known: float
    unseen: float


def central(
    data: Mapping[int, Path], seed: int, plan: Plan, say: Say = lambda _: None
) -> Accuracies:
    """Train on all known people's windows in one place; SGD with the plan's local settings."""
    known, unseen = _sides(data)
    pooled = _pool([Spar().load(data[person], "train") for person in known])
    model = Spar().model(seed)
    weights = parameters.flatten(model)
    hot = round(CENTRAL_EPOCHS * COOLING)
    for epochs, rate in ((hot, 1.0), (CENTRAL_EPOCHS - hot, 0.2)):
        say(f"central: {epochs} epochs at learning rate {rate * plan.training.learning_rate:g}")
        settings = msgspec.structs.replace(
            plan.training,
            local_epochs=epochs,
            learning_rate=rate * plan.training.learning_rate,
        )
        weights = training.train(model, weights, pooled, settings, seed + epochs).weights
    return _accuracies(data, known, unseen, weights)


def federated_plain(
    data: Mapping[int, Path], seed: int, plan: Plan, say: Say = lambda _: None
) -> Accuracies:
    """Run the plan's rounds in this process, with plain sums and without noise."""
    known, unseen = _sides(data)
    quiet = msgspec.structs.replace(
        plan,
        seed=seed,
        privacy=Privacy(mode="plain", clip_norm=plan.privacy.clip_norm, bits=24),
        cohort=msgspec.structs.replace(plan.cohort, min_devices=len(known)),
    )
    names = {person: f"person-{person:02d}" for person in data}
    apps = {
        person: client_app.build(Spar(), data[person], _party(names[person]), {})
        for person in known
    }
    grid = InProcessGrid(apps)
    shape = layout.of(Spar(), seed)
    cohort = Cohort(
        members={names[person]: Member(person, b"") for person in known},
        trainers=[names[person] for person in known],
        evaluators=[],
    )

    def heard(report: RoundReport) -> None:
        say(f"federated: round {report.round} of {quiet.rounds}, loss {report.loss:.3f}")

    run = Run(
        grid,
        quiet,
        cohort,
        name=f"reference-{seed}",
        session=modes.hub_session("plain", {}),
        charge=lambda *_: None,
        on_round=heard,
        clock=grid.clock,
        running=shape.running,
    )
    outcome = rounds.run_rounds(run, shape.initial)
    return _accuracies(data, known, unseen, outcome.weights)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 -- progress of a command


def _party(name: str) -> Callable[[str], PlainParty]:
    return lambda _mode: PlainParty(name)


def _sides(data: Mapping[int, Path]) -> tuple[list[int], list[int]]:
    return (
        [person for person in data if person not in UNSEEN],
        [person for person in data if person in UNSEEN],
    )


def _pool(parts: Sequence[Examples]) -> Examples:
    return Examples(
        np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    )


def _accuracies(
    data: Mapping[int, Path],
    known: Sequence[int],
    unseen: Sequence[int],
    weights: parameters.Vector,
) -> Accuracies:
    def share(people: Sequence[int]) -> float:
        tested = _pool([Spar().load(data[person], "test") for person in people])
        done = training.evaluate(Spar().model(0), weights, tested)
        return done.correct / done.rows

    return Accuracies(share(known), share(unseen))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over the seeds by name, and the rows they come from."""
    means = {
        name: {
            split: float(np.mean([row[split] for row in rows if row["name"] == name]))
            for split in Accuracies._fields
        }
        for name in dict.fromkeys(row["name"] for row in rows)
    }
    return {**means, "unseen_people": list(UNSEEN), "rows": list(rows)}


def main(arguments: list[str] | None = None) -> None:
    """Print both yardsticks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from the plan's on")
    parser.add_argument("--plan", type=Path, default=PLAN)
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)  # beside the demo two threads would wait for each other
    plan = plans.load(given.plan)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        data = split_people(Path(root), PEOPLE)
        for seed in range(plan.seed, plan.seed + given.seeds):
            for name, how in (("central", central), ("federated", federated_plain)):
                began = time.monotonic()
                found = how(data, seed, plan, _say)
                rows.append(
                    {"name": name, "seed": seed, **found._asdict()}
                    | {"seconds": round(time.monotonic() - began, 1)}
                )
    if given.json:
        print(json.dumps(summary(rows), indent=2))  # noqa: T201 -- the command's result
        return
    for row in rows:
        print(  # noqa: T201 -- the command's result
            f"{row['name']:<10} seed {row['seed']}: known {row['known']:.1%}, "
            f"unseen {row['unseen']:.1%}, {row['seconds']} s"
        )


if __name__ == "__main__":
    main()
