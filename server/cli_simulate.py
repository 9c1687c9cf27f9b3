"""``atoll simulate``: a plan on many simulated devices, on this machine and without a hub."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.server.cli_options import Json
from atoll.server.client import Failure, Misuse


def simulate(
    file: Annotated[Path, typer.Argument(help="The plan, a TOML file.", metavar="FILE")],
    *,
    devices: Annotated[int, typer.Option(help="How many devices there are.", min=1)],
    cohort: Annotated[
        int | None,
        typer.Option(
            help="Devices in a round, for a plan without cohort.sampling_rate. (default: all)",
            show_default=False,
            min=1,
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds. (default: the plan's)", show_default=False, min=1),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="What all draws come from. (default: the plan's)", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Processes that train at once, of a thread each; the result does not depend on "
            "it. (default: one for each core)",
            show_default=False,
            min=1,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Directory to keep the simulation in; the same command goes on from there.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Try a plan on simulated devices: what accuracy it reaches, at which ε, in what time.

    Clipping, noise, ledger and strategy are those of a real run; nothing is sent, and nothing kept
    but in a --checkpoint directory. Devices are dealt examples of the plan's task: digits,
    fashion-mnist or spar. All draws come from the seed, so that the same command gives the same
    result.
    """
    # By name: the hub's package knows nothing of the simulations that stand on it.
    simulation: Any = importlib.import_module("atoll.simulations.simulate_report")
    from atoll.federation.errors import BadPlan, FederationError
    from atoll.privacy.errors import BadParameters, PrivacyError

    try:
        simulation.main(
            file,
            devices,
            cohort,
            rounds=rounds,
            seed=seed,
            threads=threads,
            checkpoint=checkpoint,
            as_json=as_json,
        )
    except (BadPlan, BadParameters) as error:
        raise Misuse(str(error)) from error
    except (FederationError, PrivacyError) as error:
        raise Failure(str(error)) from error
