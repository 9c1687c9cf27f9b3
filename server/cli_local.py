"""``atoll plan run --engine local`` and ``--engine ray``: a plan on devices without a hub."""

import importlib
import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from atoll.federation import plan as plans
from atoll.federation.errors import BadPlan, DataMissing, LinkError, TaskMissing
from atoll.federation.plan import Plan
from atoll.server.cli_cohorts import put_cohorts
from atoll.server.cli_progress import RunProgress, counting, outcome, put_rounds
from atoll.server.client import Failure, Misuse
from atoll.server.tables import note, put_facts, put_json

RUNS: Final = Path("runs")
"""Where a run that is given no directory gets one."""


class Wanted(NamedTuple):
    """What the options say: an engine and either a number of devices or where their folders are."""

    engine: str
    devices: int | None
    examples: Path | None
    ray_address: str | None
    out: Path | None

    @property
    def given(self) -> list[str]:
        """The options that are given besides the engine."""
        return [
            f"--{name.replace('_', '-')}"
            for name, value in self._asdict().items()
            if name != "engine" and value is not None
        ]


def check(wanted: Wanted, of_fleet: Sequence[str]) -> None:
    """Raise :class:`Misuse` for options that do not go together.

    ``of_fleet`` are those given that are for a hub.
    """
    if wanted.engine == "fleet":
        if wanted.given:
            raise Misuse(
                f"{wanted.given[0]} is for --engine local and --engine ray; a fleet's devices are "
                "those that are enrolled with the hub"
            )
        return
    if "--data" in of_fleet:
        raise Misuse(
            f"--data names a hub's directory, and --engine {wanted.engine} runs without a hub; "
            "where devices' examples are is said by --examples DIR"
        )
    if of_fleet:
        raise Misuse(f"{of_fleet[0]} is for a hub, and --engine {wanted.engine} runs without one")
    if wanted.ray_address is not None and wanted.engine != "ray":
        raise Misuse("--ray-address is for --engine ray; --engine local is this process alone")
    if (wanted.devices is None) == (wanted.examples is None):
        raise Misuse(
            "say which devices there are: --devices N deals examples of the task out to so many, "
            "--examples DIR takes one for each folder in DIR; give one of the two"
        )


def run_here(text: str, wanted: Wanted, *, as_json: bool) -> None:
    """Run a plan to its end on this machine, or on Ray's; print what came of it."""
    # By name: the hub's package knows nothing of the simulations that stand on it.
    simulated: Any = importlib.import_module("atoll.simulations.devices")
    from atoll.server import local_run

    plan = plans.loads(text)
    folder = wanted.out or _new_folder(plan)
    devices = _devices(simulated, plan, wanted, (folder / "kept").resolve())
    _check(plan, devices)
    with local_run.opened(folder, text, devices, time.time) as run:
        note(f"{'Going on' if run.resumed else 'Running'} in {folder}")
        try:
            with ExitStack() as stack:
                fleet = _started(simulated, wanted, devices, stack)
                progress = stack.enter_context(RunProgress())
                ended = run.carry_out(fleet, progress.show)
        except KeyboardInterrupt:
            note(f"\n{_how_to_go_on(folder)}")
            raise
        except LinkError as error:
            raise Failure(f"{error}. {_how_to_go_on(folder)}") from error
        candidate = run.candidate
    if as_json:
        where = {"folder": str(folder), "candidate": str(candidate) if candidate else None}
        put_json(ended | {"engine": wanted.engine} | where)
    else:
        _put(ended, wanted, len(devices), candidate)
    if candidate is None:
        raise Failure(f"the run is {ended['state']}: {ended['reason'] or 'no reason is given'}")


def _devices(simulated: Any, plan: Plan, wanted: Wanted, kept: Path) -> Sequence[Any]:  # noqa: ANN401 -- loaded by name
    from atoll.federation import task

    try:
        task.find(plan.task)
        with counting("keys made") as heard:
            made: Sequence[Any] = (
                simulated.dealt(plan, wanted.devices, kept, heard)
                if wanted.examples is None
                else simulated.found(plan, wanted.examples, kept, heard)
            )
    except BadPlan as error:
        raise Misuse(str(error)) from error
    except (TaskMissing, DataMissing) as error:
        raise Failure(str(error)) from error
    return made


def _check(plan: Plan, devices: Sequence[Any]) -> None:
    """Refuse what could not work with these devices before anything is written."""
    from atoll.federation import release
    from atoll.privacy.errors import BadParameters

    if plan.cohort.rule is not None:
        raise Misuse(
            "cohort.rule looks at what agents report to a hub, and without a hub nobody reports: "
            "leave cohort.rule out"
        )
    wanted = plan.cohort.labels.items()
    trainers = sum(wanted <= device.labels.items() for device in devices)
    if trainers < plan.cohort.min_devices:
        labels = ", ".join(f"{name}={value}" for name, value in wanted)
        raise Misuse(
            f"{trainers} of {len(devices)} devices would train"
            + (f" ({labels} is what the plan asks for, in their labels.toml)" if labels else "")
            + f" and the plan needs {plan.cohort.min_devices}; lower cohort.min_devices, or have "
            "more devices"
        )
    try:
        release.check(plan)
        release.check_population(plan, trainers)
    except BadParameters as error:
        raise Misuse(f"the plan cannot be run: {error}") from error


def _started(simulated: Any, wanted: Wanted, devices: Sequence[Any], until: ExitStack) -> Any:  # noqa: ANN401 -- loaded by name
    """Return the fleet, which runs until the stack is left."""
    if wanted.engine == "local":
        with counting("devices started") as heard:
            return until.enter_context(simulated.in_process(devices, heard))
    if importlib.util.find_spec("ray") is None:
        raise Failure("--engine ray needs Ray, which is not installed: pip install 'atoll[ray]'")
    return until.enter_context(simulated.on_ray(devices, wanted.ray_address))


def _new_folder(plan: Plan) -> Path:
    """Return the first directory of the plan's name and a number that is not there yet."""
    names = (RUNS / f"{plan.name}-{number}" for number in count(1))
    return next(path for path in names if not path.exists())


def _how_to_go_on(folder: Path) -> str:
    return f"The same command with --out {folder} goes on from the last round."


def _put(ended: dict[str, Any], wanted: Wanted, devices: int, candidate: Path | None) -> None:
    """Print what came of a run, but for each device's own accuracy: that is in the JSON."""
    measured = outcome(ended).items()
    put_facts(
        {
            "plan": ended["name"],
            "engine": f"{wanted.engine}, {devices} devices",
            "state": ended["state"],
            "why": ended["reason"],
            "candidate": candidate,
        }
        | {name: value for name, value in measured if not name.startswith("by_device ")}
    )
    put_cohorts(ended["metrics"] or {})
    put_rounds(ended)
