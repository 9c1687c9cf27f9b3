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
        name: rounds.Member(int(node), job["certificates"][name].encode())
        for name, node in job["nodes"].items()
    }
    cohort = rounds.Cohort(members, sorted(members), sorted(members))
    seconds: list[float] = []

    def on_round(report: rounds.RoundReport) -> None:
        if report.dropped:
            raise RuntimeError(f"devices dropped out: {report.dropped}")
        seconds.append(report.seconds)

    rounds.run_rounds(
        BundledGrid(grid),
        the_plan,
        cohort,
        hub_session(the_plan.privacy.mode, cohort.roster),
        lambda *_: None,
        on_round,
        np.zeros(PARAMETERS, np.float32),
        run=the_plan.name,
    )
    (folder / f"{the_plan.name}.json").write_text(json.dumps(seconds))
