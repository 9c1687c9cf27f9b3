"""What ``atoll simulate`` shows: rounds as they go, and a table or JSON at the end."""

import json
import sys
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
from atoll.simulations import memory, populations, resumable, workers
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
    Raises :class:`atoll.federation.errors.BadCheckpoint` for a directory of anything else.
    """
    plan = plans.load(file)
    plan = msgspec.structs.replace(
        plan,
        rounds=plan.rounds if rounds is None else rounds,
        seed=plan.seed if seed is None else seed,
    )
    simulated = populations.named(plan.task, devices, plan.seed)
    kept = resumable.opened(checkpoint, plan, simulated, cohort)
    before = len(kept.rounds) if kept else 0
    with _progress(plan.rounds, before, Console(stderr=True)) as show, _threads(1):
        ended, heard = resumable.run(
            plan, simulated, cohort, show, kept=kept, workers=threads or workers.cores()
        )
    return gather(plan, devices, heard, ended, before, memory.peak() + ended.beside)


def gather(
    plan: Plan,
    devices: int,
    heard: Sequence[Round],
    ended: Ended,
    before: int,
    peak: int,
) -> dict[str, Any]:
    """Return the facts of a simulation, JSON-able; ``peak`` in bytes.

    ``accuracy`` is that of the result, which is that after the last round. ``seconds`` are those of
    all rounds, without evaluations; ``before`` of the rounds were done by earlier commands.
    """
    seconds = sum(done.seconds for done in heard)
    history = [asdict(done) for done in heard]
    if history:
        history[-1]["accuracy"] = ended.accuracy
    looked = [done for done in history if done["accuracy"] is not None]
    best = max(looked, key=lambda done: done["accuracy"], default=None)
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
            "before": before,
            "per_second": len(heard) / seconds if seconds else None,
            "seconds": seconds,
            "mean_cohort": sum(done.drawn for done in heard) / max(len(heard), 1),
        },
        "accuracy": ended.accuracy,
        "last_round": _looked_at(history[-1] if history else None),
        "best_round": _looked_at(best),
        "privacy": {
            "epsilon": heard[-1].epsilon if heard else None,
            "delta": plan.privacy.delta,
            "noise_multiplier": plan.privacy.noise_multiplier,
        },
        "peak_memory": peak,
        "history": history,
    }


def _looked_at(done: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {name: done[name] for name in ("round", "accuracy")} if done else None


def table(facts: Mapping[str, Any]) -> Table:
    """Return the facts as a table."""
    rounds, epsilon = facts["rounds"], facts["privacy"]["epsilon"]
    shown = Table(title=f"{facts['plan']} on {facts['devices']:,} simulated devices")
    shown.title_justify = "left"
    shown.show_header = False
    shown.add_column()
    shown.add_column()
    how = facts["engine"] + (f": {facts['reason']}" if facts["reason"] else "")
    of_all = "all rounds" + (f", {rounds['before']} of them earlier" if rounds["before"] else "")
    rows = {
        "accuracy": f"{facts['accuracy']:.1%} of examples that devices held back" + _best(facts),
        "ε": "not bounded: no noise"
        if epsilon is None
        else f"{epsilon:.3g} at δ = {facts['privacy']['delta']:g}",
        "rounds": f"{rounds['done']} of {rounds['planned']}, {rounds['trained']} in the result"
        + (" (the budget is spent)" if facts["ended"] == "budget" else ""),
        "cohort": f"{rounds['mean_cohort']:,.4g} devices on average",
        "speed": "–"
        if rounds["per_second"] is None
        else f"{rounds['per_second']:.3g} rounds/s, {rounds['seconds']:.1f} s for {of_all}",
        "training": how,
        "peak memory": f"{facts['peak_memory'] / 1e6:,.0f} MB, worker processes included",
    }
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def _best(facts: Mapping[str, Any]) -> str:
    """Say which round was better than the last one, if any was."""
    best, last = facts["best_round"], facts["last_round"]
    if best is None or best["accuracy"] <= last["accuracy"]:
        return ""
    return f"; best after round {best['round']}: {best['accuracy']:.1%}"


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
def _progress(total: int, before: int, console: Console) -> Iterator[OnRound]:
    """Show rounds with a bar on a terminal, otherwise a line for each evaluation.

    ``before`` of the rounds are done already.
    """
    if not console.is_terminal:
        if 0 < before < total:
            console.print(f"going on after round {before}/{total}", highlight=False)

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
        task = progress.add_task("", total=total, completed=before)
        last = ""

        def show(done: Round) -> None:
            nonlocal last
            if done.accuracy is not None:
                last = f"  accuracy {done.accuracy:.1%}"
            said = line(done) if done.accuracy is not None else line(done) + last
            progress.update(task, completed=done.round, description=said)

        yield show
