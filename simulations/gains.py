"""What strategies, codecs, partial training and asynchronous steps gain, and what they cost.

    python -m atoll.simulations.gains [--only TABLE] [--json]

Prints the tables of docs/federation.md, on scikit-learn's digits (:mod:`atoll.simulations.digits`)
with seeds that are fixed; each takes one to three minutes of one core. There is no noise.
``--json`` prints a list of ``{"table", "case", "values"}``.

- ``scaffold``: devices of few classes each, simulated (:mod:`atoll.simulations.simulate`).
- ``codec``: real ClientApps on the in-process engine, and the bytes that they send.
- ``buffered``: the same, with a pace each (:mod:`atoll.simulations.pace`), one of them slow.

Rounding takes its draws from the seed too; sums of floats depend on the machine, in the last bits.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from atoll.federation import buffered, client_app, layout, rounds, training
from atoll.federation import plan as plans
from atoll.federation.cohort import Cohort, Member
from atoll.federation.kept import KeptHere
from atoll.federation.plan import Plan
from atoll.federation.run import RoundReport, Run
from atoll.privacy.plain import PlainHubSession, PlainParty
from atoll.privacy.sums import PartySum
from atoll.simulations import digits, simulate
from atoll.simulations.pace import PacedGrid
from atoll.simulations.populations import DirichletPopulation, Simulated

SEEDS: Final = (0, 1, 2)
UNLIKE: Final = 0.1
"""α of Dir(α) by which classes are dealt, where devices have few of them."""
ALIKE: Final = 1.0
PACES: Final = (1.0,) * 9 + (20.0,)
"""Seconds that devices take where they have a pace."""

Say = Callable[[str], None]


class Line(NamedTuple):
    """A line of a table: what was run, and what was measured, by column.

    A sequence has a number for each seed.
    """

    case: str
    values: Mapping[str, float | Sequence[float]]


class Ended(NamedTuple):
    """A run over real ClientApps: ``accuracy`` on what was kept back, ``seconds`` by its clock."""

    accuracy: float
    seconds: float
    reports: Sequence[RoundReport]


def _plan(seed: int, count: int, more: str) -> Plan:
    head = f'name = "gains"\ntask = "digits"\nmodel = "digits"\nseed = {seed}\nrounds = {count}\n'
    return plans.loads(head + more)


# --- scaffold ---------------------------------------------------------------------------------

LOOKED_AT: Final = (5, 10, 20)
SCAFFOLD: Final = {
    "FedAvg": "",
    "FedProx, μ = 0.1": "proximal = 0.1",
    "SCAFFOLD": "control_steps = 50",
}
_UNLIKE_PLAN: Final = """
training = {{ local_epochs = 10, batch_size = 10, learning_rate = 0.05, momentum = 0.0{more} }}
cohort = {{ min_devices = 20 }}
privacy = {{ mode = "plain", clip_norm = 20.0, bits = 20 }}
"""


def scaffold(say: Say) -> list[Line]:
    """Return accuracies on what 20 devices of few classes held back, after so many rounds."""
    lines = []
    for case, more in SCAFFOLD.items():
        found = []
        for seed in SEEDS:
            plan = _plan(seed, LOOKED_AT[-1], _UNLIKE_PLAN.format(more=more and f", {more}"))
            pools = digits.pools()
            population = DirichletPopulation(20, *pools, seed, alpha=UNLIKE)
            heard: list[simulate.Round] = []
            ended = simulate.run(
                plan, Simulated(digits.Digits(), population), None, heard.append, every=5
            )
            seen = {done.round: done.accuracy for done in heard}
            seen[plan.rounds] = ended.accuracy
            found.append([seen[number] or 0.0 for number in LOOKED_AT])
            say(f"scaffold: {case}, seed {seed}: {ended.accuracy:.3f}")
        columns = zip(LOOKED_AT, zip(*found, strict=True), strict=True)
        lines.append(Line(case, {f"after {number} rounds": many for number, many in columns}))
    return lines


# --- real ClientApps --------------------------------------------------------------------------


def play(plan: Plan, folder: Path, paces: Sequence[float]) -> Ended:
    """Run the plan on digits that the plan's seed deals to a device for each of ``paces``."""
    dealt, kept = digits.deal(folder, len(paces), ALIKE, plan.seed)
    task = digits.Digits()
    names = [f"device-{number:02d}" for number in range(1, len(dealt) + 1)]
    apps = {
        number: client_app.build(task, data, _party(name), {}, kept=KeptHere())
        for number, (name, data) in enumerate(zip(names, dealt, strict=True), 1)
    }
    grid = PacedGrid(apps, lambda node: paces[node - 1])
    cohort = Cohort({name: Member(number, b"") for number, name in enumerate(names, 1)}, names, [])
    shape = layout.of(task, plan.seed, plan.layers)
    reports: list[RoundReport] = []
    run = Run(
        grid,
        plan,
        cohort,
        name="gains",
        session=PlainHubSession(),
        charge=lambda *_: None,
        on_round=reports.append,
        clock=grid.clock,
        frozen=shape.frozen,
        running=shape.running,
    )
    run_plan = buffered.run_buffered if plan.asynchrony else rounds.run_rounds
    outcome = run_plan(run, shape.initial)
    done = training.evaluate(shape.model, shape.whole(outcome.weights), kept)
    return Ended(done.correct / done.rows, grid.clock.now(), reports)


def _party(name: str) -> Callable[[str], PartySum]:
    return lambda _mode: PlainParty(name)


def _over_seeds(case: str, count: int, more: str, paces: Sequence[float], say: Say) -> list[Ended]:
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(play(_plan(seed, count, more), Path(folder), paces))
        say(f"{case}, seed {seed}: {found[-1].accuracy:.3f}")
    return found


CODEC_ROUNDS: Final = 30
CODECS: Final = {
    "everything": "",
    "`random-mask`, share 0.1": 'codec = { kind = "random-mask", share = 0.1 }',
    "the same with error feedback": (
        'codec = { kind = "random-mask", share = 0.1, error_feedback = true }'
    ),
    "`top-k`, share 0.1": 'codec = { kind = "top-k", share = 0.1 }',
    "`top-k`, share 0.01": 'codec = { kind = "top-k", share = 0.01 }',
    "the same without error feedback": (
        'codec = { kind = "top-k", share = 0.01, error_feedback = false }'
    ),
    '`downlink = "float16"`': 'codec = { downlink = "float16" }',
    "`lora_rank = 4` on both layers, W frozen at random": (
        'layers = { lora_layers = ["1", "3"], lora_rank = 4 }'
    ),
    "`trained` the last layer alone, the first frozen at random": 'layers = { trained = ["3.*"] }',
}
_ALIKE_PLAN: Final = """
training = { local_epochs = 2, batch_size = 16, learning_rate = 0.05 }
cohort = { min_devices = 10 }
privacy = { mode = "plain", clip_norm = 10.0, bits = 16 }
"""


def codec(say: Say) -> list[Line]:
    """Return a device's bytes in the last round of the last seed, and accuracies."""
    lines, paces = [], (1.0,) * 10
    for case, more in CODECS.items():
        found = _over_seeds(f"codec: {case}", CODEC_ROUNDS, f"{_ALIKE_PLAN}{more}\n", paces, say)
        last = found[-1].reports[-1]
        values: dict[str, float | Sequence[float]] = {
            "bytes up": last.bytes_up / len(paces),
            "bytes down": last.bytes_down / len(paces),
            "accuracy": [one.accuracy for one in found],
        }
        lines.append(Line(case, values))
    return lines


BUFFERED: Final = {
    "20 rounds of all ten": (20, "cohort = { min_devices = 5 }"),
    "20 rounds, `enough = 9`": (20, "cohort = { min_devices = 5, enough = 9 }"),
    "40 steps, `buffer = 5`, `concurrency = 10`": (
        40,
        "cohort = { min_devices = 5 }\nasynchrony = { buffer = 5, concurrency = 10 }",
    ),
}
_PACED_PLAN: Final = """
training = { local_epochs = 2, batch_size = 16, learning_rate = 0.05 }
privacy = { mode = "plain", clip_norm = 10.0, bits = 16, noise = "central" }
"""


def in_steps(say: Say) -> list[Line]:
    """Return how long runs of as many updates take with one slow device, and accuracies."""
    lines = []
    for case, (count, more) in BUFFERED.items():
        found = _over_seeds(f"buffered: {case}", count, f"{_PACED_PLAN}{more}\n", PACES, say)
        slowest = f"device-{len(PACES):02d}"
        heard = [sum(slowest in one.survivors for one in run.reports) for run in found]
        values: dict[str, float | Sequence[float]] = {
            "seconds": float(np.mean([one.seconds for one in found])),
            "updates of the slow device": float(np.mean(heard)),
            "accuracy": [one.accuracy for one in found],
        }
        lines.append(Line(case, values))
    return lines


# --- the command ------------------------------------------------------------------------------

TABLES: Final[Mapping[str, Callable[[Say], list[Line]]]] = {
    "scaffold": scaffold,
    "codec": codec,
    "buffered": in_steps,
}


def _said(value: float | Sequence[float]) -> str:
    """Say a number, or the mean of several with the least and the largest."""
    if isinstance(value, Sequence):
        return f"{np.mean(value):.3f} ({min(value):.3f} to {max(value):.3f})"
    return f"{value:,.0f}"


def table(lines: Sequence[Line]) -> str:
    """Return lines as a Markdown table."""
    columns = list(lines[0].values)
    told = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    told += [f"| {' | '.join([line.case, *map(_said, line.values.values())])} |" for line in lines]
    return "\n".join(told)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure tables and print them."""
    parser = argparse.ArgumentParser(prog="python -m atoll.simulations.gains")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(TABLES),
        help="measure this table; may be repeated (default: all, some minutes)",
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # networks this small train fastest so
    found = {name: make(_say) for name, make in TABLES.items() if name in (given.only or TABLES)}
    if given.json:
        told: list[dict[str, Any]] = [
            {"table": name, "case": line.case, "values": dict(line.values)}
            for name, lines in found.items()
            for line in lines
        ]
        sys.stdout.write(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n\n".join(table(lines) for lines in found.values()) + "\n")
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
