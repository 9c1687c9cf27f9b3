"""What ``atoll simulate`` shows: rounds as they go, and a table or JSON at the end."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from atoll.federation import plan as plans
from atoll.federation.plan import Plan
from atoll.simulations import populations, resumable, workers
from atoll.simulations.simulate import Ended, Round

OnRound = Callable[[Round], None]


def main(
    file: Path,
    devices: int,
    cohort: int | None,
    *,
    rounds: int | None,
    seed: int | None,
    threads: int | None,
    checkpoint: Path | None,
    as_json: bool,
) -> None:
    """Simulate the plan in ``file`` and print what came of it; progress goes to stderr.

    ``rounds`` and ``seed`` replace the plan's. Raises what :func:`simulate.run` does.
    """
    facts = facts_of(
        file,
        devices,
        cohort,
        rounds=rounds,
        seed=seed,
        threads=threads,
        checkpoint=checkpoint,
    )
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        Console().print(table(facts))


def facts_of(
    file: Path,
    devices: int,
    cohort: int | None,
    *,
    rounds: int | None,
    seed: int | None,
    threads: int | None,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Simulate and return the facts; see :func:`main`.

    ``checkpoint`` is a directory in which the simulation is kept and from which it goes on.
    """
    plan = plans.load(file)
    plan = msgspec.structs.replace(
        plan,
        rounds=plan.rounds if rounds is None else rounds,
        seed=plan.seed if seed is None else seed,
    )
    simulated = populations.named(plan.task, devices, plan.seed)
    began = time.perf_counter()
    with _progress(plan.rounds, Console(stderr=True)) as show, _threads(1):
        ended, heard = resumable.run(
            plan, simulated, cohort, show, directory=checkpoint, workers=threads or workers.cores()
        )
    return gather(plan, devices, heard, ended, time.perf_counter() - began, peak_memory())


def gather(
    plan: Plan,
    devices: int,
    heard: Sequence[Round],
    ended: Ended,
    seconds: float,
    peak: int,
) -> dict[str, Any]:
    """Return the facts of a simulation, JSON-able; ``seconds`` of all and ``peak`` in bytes."""
    training = sum(done.seconds for done in heard)
    return {
        "plan": plan.name,
        "task": plan.task,
        "devices": devices,
        "seed": plan.seed,
        "engine": ended.engine,
        "reason": ended.reason,
        "ended": ended.ended,
        "rounds": {
            "planned": plan.rounds,
            "done": len(heard),
            "trained": ended.rounds,
            "per_second": len(heard) / training if training else None,
            "seconds": seconds,
            "mean_cohort": sum(done.drawn for done in heard) / max(len(heard), 1),
        },
        "accuracy": ended.accuracy,
        "privacy": {
            "epsilon": heard[-1].epsilon if heard else None,
            "delta": plan.privacy.delta,
            "noise_multiplier": plan.privacy.noise_multiplier,
        },
        "peak_memory": peak,
        "history": [asdict(done) for done in heard],
    }


def table(facts: Mapping[str, Any]) -> Table:
    """Return the facts as a table."""
    rounds, epsilon = facts["rounds"], facts["privacy"]["epsilon"]
    shown = Table(title=f"{facts['plan']} on {facts['devices']:,} simulated devices")
    shown.title_justify = "left"
    shown.show_header = False
    shown.add_column()
    shown.add_column()
    how = facts["engine"] + (f": {facts['reason']}" if facts["reason"] else "")
    rows = {
        "accuracy": f"{facts['accuracy']:.1%} of examples that devices held back",
        "ε": "not bounded: no noise"
        if epsilon is None
        else f"{epsilon:.3g} at δ = {facts['privacy']['delta']:g}",
        "rounds": f"{rounds['done']} of {rounds['planned']}, {rounds['trained']} in the result"
        + (" (the budget is spent)" if facts["ended"] == "budget" else ""),
        "cohort": f"{rounds['mean_cohort']:,.4g} devices on average",
        "speed": "–"
        if rounds["per_second"] is None
        else f"{rounds['per_second']:.3g} rounds/s, {rounds['seconds']:.1f} s in all",
        "training": how,
        "peak memory": f"{facts['peak_memory'] / 1e6:,.0f} MB",
    }
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def line(done: Round) -> str:
    """Return what is told of a round."""
    words = [f"{done.survivors} of {done.drawn} devices"]
    if done.loss is not None:
        words.append(f"loss {done.loss:.3f}")
    if done.epsilon is not None:
        words.append(f"ε {done.epsilon:.3g}")
    if done.accuracy is not None:
        words.append(f"accuracy {done.accuracy:.1%}")
    return "  ".join(words)


def peak_memory() -> int:
    """Return the most bytes that this process has occupied."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(total: int, console: Console) -> Iterator[OnRound]:
    """Show rounds with a bar on a terminal, otherwise a line for each evaluation."""
    if not console.is_terminal:

        def tell(done: Round) -> None:
            if done.accuracy is not None:
                console.print(f"round {done.round}/{total}  {line(done)}", highlight=False)

        yield tell
        return
    with Progress(
        BarColumn(),
        TextColumn("{task.completed}/{task.total} rounds", markup=False),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=total)
        last = ""

        def show(done: Round) -> None:
            nonlocal last
            if done.accuracy is not None:
                last = f"  accuracy {done.accuracy:.1%}"
            said = line(done) if done.accuracy is not None else line(done) + last
            progress.update(task, completed=done.round, description=said)

        yield show
