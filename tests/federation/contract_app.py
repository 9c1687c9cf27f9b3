"""The ServerApp of the contract test, loaded by Flower in its own process."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from blobs import Blobs
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from atoll.federation import buffered, parameters, plan, rounds
from atoll.federation.bundled_grid import BundledGrid
from atoll.federation.cohort import Cohort, Member
from atoll.federation.evaluation import ask, evaluate
from atoll.federation.run import RoundReport, Run
from atoll.privacy.modes import hub_session

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    grid = BundledGrid(grid)
    folder = Path(os.environ["CONTRACT_FOLDER"])
    job = json.loads((folder / f"{context.run_config['job']}.json").read_text())
    the_plan = plan.loads(job["plan"])
    members = {
        name: Member(int(node), job["certificates"][name].encode())
        for name, node in job["nodes"].items()
    }
    cohort = Cohort(members, job["trainers"], sorted(members))
    reports = []

    def on_round(report: RoundReport) -> None:
        reports.append(
            {
                "round": report.round,
                "seconds": report.seconds,
                "survivors": list(report.survivors),
                "dropped": dict(report.dropped),
                "up": report.bytes_up,
                "down": report.bytes_down,
            }
        )
        (folder / "rounds.json").write_text(json.dumps(reports))

    run_plan = buffered.run_buffered if the_plan.asynchrony else rounds.run_rounds
    run = Run(
        grid,
        the_plan,
        cohort,
        name=str(context.run_config["job"]),
        session=hub_session(the_plan.privacy.mode, cohort.roster),
        charge=lambda *_: None,
        on_round=on_round,
    )
    done = run_plan(run, parameters.flatten(Blobs().model(the_plan.seed)))
    survivors = reports[-1]["survivors"]
    nodes = {name: cohort.nodes[name] for name in survivors}
    there = Cohort(members, survivors, survivors)
    scores = evaluate(replace(run, cohort=there), done.weights)
    started = time.monotonic()
    answers = ask(grid, nodes, "echo", b"ping", 20)
    seconds = time.monotonic() - started
    result = {
        "rounds": reports,
        "query_seconds": seconds,
        "ended": done.ended,
        "correct": {name: reply.correct for name, reply in scores.items()},
        "rows": {name: reply.rows for name, reply in scores.items()},
        "answers": {name: answer.decode() for name, answer in answers.items()},
    }
    part = folder / "result.part"
    part.write_text(json.dumps(result))
    part.rename(folder / "result.json")
