"""The server side of :mod:`benchmarks.fleet_round`: a ServerApp, loaded by Flower's executor.

Its job and its result are files in ``$BENCH_FOLDER``.
"""

import json
import os
from pathlib import Path
from typing import Final

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from atoll.federation import plan, rounds
from atoll.federation.bundled_grid import BundledGrid
from atoll.federation.cohort import Cohort, Member
from atoll.federation.run import RoundReport, Run
from atoll.privacy.modes import hub_session

PARAMETERS: Final = 1_000_000

server = ServerApp()


@server.main()
def serve(grid: Grid, _: Context) -> None:
    """Run the plan and write what each round took."""
    folder = Path(os.environ["BENCH_FOLDER"])
    job = json.loads((folder / "job.json").read_text())
    the_plan = plan.loads(job["plan"])
    members = {
        name: Member(int(node), job["certificates"][name].encode())
        for name, node in job["nodes"].items()
    }
    cohort = Cohort(members, sorted(members), sorted(members))
    seconds: list[float] = []

    def on_round(report: RoundReport) -> None:
        if report.dropped:
            raise RuntimeError(f"devices dropped out: {report.dropped}")
        seconds.append(report.seconds)

    run = Run(
        BundledGrid(grid),
        the_plan,
        cohort,
        name=the_plan.name,
        session=hub_session(the_plan.privacy.mode, cohort.roster),
        charge=lambda *_: None,
        on_round=on_round,
    )
    rounds.run_rounds(run, np.zeros(PARAMETERS, np.float32))
    (folder / f"{the_plan.name}.json").write_text(json.dumps(seconds))
