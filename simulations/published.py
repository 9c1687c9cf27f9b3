"""What a simulation reaches, beside what others have published of the same setting.

    python -m atoll.simulations.published [--json] [--only NAME] [--checkpoint DIR]

Each row is a plan in this folder, the devices that it is simulated on, and the published number.
The rows of Fashion-MNIST take an hour or more each; with ``--checkpoint`` they go on where they
broke off, and what has ended is told at once. With ``--json`` the rows are those of the
benchmarks (``{"case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "goal", "met"}``).
Exit status 1 when a number is not met.

Fashion-MNIST: Flower's baseline ``niid_bench`` (its README), ten devices, Dir(0.5), the best
accuracy on the test set over 50 rounds, mean of several runs. A number is met when ours, of one
run, is within half a point on either side. Its weight decay of 1e-5 is left out.

SPAR: Burns et al. 2018, arXiv 1802.01489v1, ten people: 99.6 % on held-back stretches of people
who trained (a convolutional recurrent network), 87.3 % on people who did not (a random forest,
the best of four there), each trained in one place. A number is met when ours is as high, less
half a point.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from atoll.federation import plan as plans
from atoll.federation.errors import FederationError
from atoll.federation.plan import Plan
from atoll.simulations import evaluation, populations, resumable, spar_folds
from atoll.simulations.populations import Simulated
from atoll.simulations.simulate import Round
from atoll.simulations.simulate_report import line
from atoll.simulations.spar import Spar

DEVICES: Final = 10
TOLERANCE: Final = 0.5
"""Percentage points."""
_FOLDER: Final = Path(__file__).parent
_FLOWER: Final = "Flower niid_bench"
_BURNS: Final = "Burns et al. 2018"


class Ran(NamedTuple):
    """One simulation as it went: accuracies in the order of their rounds, on ``tested`` rows."""

    accuracies: tuple[float, ...]
    tested: int


class Row(NamedTuple):
    """A published number and how ours comes about.

    ``value`` is in per cent. ``parts`` are the simulations it takes, ``measured`` what is made of
    them, a share.
    """

    name: str
    plan: Path
    case: str
    metric: str
    value: float
    source: str
    parts: Callable[[Plan], Sequence[Simulated]]
    measured: Callable[[Sequence[Ran]], float]
    higher_is_met: bool


def best(ran: Sequence[Ran]) -> float:
    """Return the highest accuracy after any round."""
    return max(accuracy for one in ran for accuracy in one.accuracies)


def pooled(ran: Sequence[Ran]) -> float:
    """Return the last accuracy over all rows that were tested."""
    return sum(one.accuracies[-1] * one.tested for one in ran) / sum(one.tested for one in ran)


def met(row: Row, ours: float) -> bool:
    """Return whether ``ours``, in per cent, is what was published."""
    apart = ours - row.value
    return apart >= -TOLERANCE if row.higher_is_met else abs(apart) <= TOLERANCE


def report(row: Row, ours: float) -> dict[str, Any]:
    """Return a measured row as the benchmarks print theirs; ``ours`` is in per cent."""
    return {
        "case": row.case,
        "metric": row.metric,
        "unit": "%",
        "ours": ours,
        "peer": row.value,
        "peer_name": row.source,
        "ratio": None,
        "goal": row.value - TOLERANCE if row.higher_is_met else row.value,
        "met": met(row, ours),
    }


def run(row: Row, checkpoint: Path | None, say: Callable[[str], None]) -> float:
    """Simulate a row's parts and return what is measured, in per cent.

    Raises what :func:`simulate.run` does.
    """
    plan = plans.load(row.plan)
    parts, ran = row.parts(plan), []
    for number, part in enumerate(parts, 1):
        where = f"{row.name}, {number} of {len(parts)}" if len(parts) > 1 else row.name
        folder = checkpoint and (
            checkpoint / row.name / f"part-{number}" if len(parts) > 1 else checkpoint / row.name
        )
        ran.append(_ran(plan, part, folder, _teller(plan, where, say)))
    return 100 * row.measured(ran)


def _ran(plan: Plan, part: Simulated, folder: Path | None, tell: Callable[[Round], None]) -> Ran:
    kept = resumable.opened(folder, plan, part, None)
    ended, heard = resumable.run(plan, part, None, tell, kept=kept)
    seen = [done.accuracy for done in heard if done.accuracy is not None]
    tested = sum(
        len(held.y) for held in populations.evaluated_on(part.population, evaluation.EVALUATORS)
    )
    return Ran((*seen, ended.accuracy), tested)


def _teller(plan: Plan, where: str, say: Callable[[str], None]) -> Callable[[Round], None]:
    return lambda done: say(f"{where}: round {done.round}/{plan.rounds}  {line(done)}")


def _fashion(plan: Plan) -> Sequence[Simulated]:
    return [populations.named(plan.task, DEVICES, plan.seed)]


def _known(_: Plan) -> Sequence[Simulated]:
    sets = spar_folds.recordings()
    return [Simulated(Spar(), spar_folds.in_time(sets, fold)) for fold in range(spar_folds.FOLDS)]


def _unseen(_: Plan) -> Sequence[Simulated]:
    sets = spar_folds.recordings()
    return [Simulated(Spar(), spar_folds.of_people(sets, fold)) for fold in range(spar_folds.FOLDS)]


def _niid(strategy: str, value: float) -> Row:
    name = f"niid-fashion-{strategy.lower()}"
    return Row(
        name=name,
        plan=_FOLDER / f"{name}.toml",
        case=f"Fashion-MNIST, {DEVICES} devices, Dir(0.5), {strategy}",
        metric=f"best test accuracy of 50 rounds, ± {TOLERANCE:g}",
        value=value,
        source=_FLOWER,
        parts=_fashion,
        measured=best,
        higher_is_met=False,
    )


def _spar(name: str, value: float, which: str, parts: Callable[[Plan], Sequence[Simulated]]) -> Row:
    return Row(
        name=name,
        plan=_FOLDER / "spar-people.toml",
        case=f"SPAR, one device a person, {which}",
        metric="accuracy over five folds",
        value=value,
        source=_BURNS,
        parts=parts,
        measured=pooled,
        higher_is_met=True,
    )


ROWS: Final = (
    _spar("spar-known", 99.6, "people who trained", _known),
    _spar("spar-unseen", 87.3, "people who did not train", _unseen),
    _niid("FedAvg", 88.09),
    _niid("FedProx", 88.15),
    _niid("SCAFFOLD", 88.44),
    _niid("FedNova", 88.22),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rows and print them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m atoll.simulations.published")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument(
        "--only",
        action="append",
        choices=[row.name for row in ROWS],
        help="run this row; may be repeated (default: all, which takes hours)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="keep simulations here, and go on from here"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # networks this small train fastest so
    rows = [row for row in ROWS if not given.only or row.name in given.only]
    try:
        found = [report(row, run(row, given.checkpoint, _say)) for row in rows]
    except FederationError as error:
        parser.error(str(error))
    if given.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    for row in () if given.json else found:
        verdict = "met" if row["met"] else "not met"
        sys.stdout.write(
            f"{row['case']}: {row['metric']} {row['ours']:.2f} %, published {row['peer']:g} % "
            f"({row['peer_name']}): {verdict}\n"
        )
    return int(any(row["met"] is False for row in found))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
