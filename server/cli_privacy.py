"""``atoll privacy``: what rounds will cost, and what they have cost."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from atoll.server.cli_options import Data, Json, connect, guarded
from atoll.server.cli_plot import put_plot
from atoll.server.client import Failure, Misuse
from atoll.server.tables import put, put_facts, put_json, put_table

if TYPE_CHECKING:  # numpy and more, for which --help does not wait
    from atoll.privacy.planning import Forecast, Series

app = typer.Typer(
    help="Differential privacy: reckon what a plan costs, show what is spent.",
    no_args_is_help=True,
)

ROWS: Final = 5
"""So many lines of the curve are printed as a table."""

_HOLDS: Final = {
    "zero-out": "a device's contribution being there or left out",
    "replace-one": "a device's contribution being replaced by any other",
}


@app.command("plan")
@guarded
def plan(
    *,
    population: Annotated[int, typer.Option(help="Devices that may take part.")],
    cohort: Annotated[int, typer.Option(help="Devices that take part in a round.")],
    rounds: Annotated[int, typer.Option(help="Rounds.")],
    delta: Annotated[
        float | None,
        typer.Option(help="δ of the promise. (default: 1/(10·population))", show_default=False),
    ] = None,
    sampling: Annotated[
        Literal["none", "poisson", "fixed"],
        typer.Option(
            help="How cohorts come about: chosen in the open (none), or drawn in secret, each "
            "device on its own (poisson) or exactly so many (fixed)."
        ),
    ] = "none",
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="σ of the noise on the sum over the clipping norm: tells ε."),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Most ε to spend: tells the least noise multiplier.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Reckon what rounds will cost. Needs no hub.

    Give --noise-multiplier to be told ε, or --epsilon to be told the least noise that keeps
    within it.
    """
    from atoll.privacy import planning
    from atoll.privacy.errors import BadParameters

    if (noise_multiplier is None) == (epsilon is None):
        raise Misuse("give one of --noise-multiplier and --epsilon: the other one is what is told")
    try:
        series = planning.Series(
            population,
            cohort,
            rounds,
            planning.default_delta(population) if delta is None else delta,
            sampling,
        )
        if noise_multiplier is not None:
            made = planning.with_noise(series, noise_multiplier)
        elif epsilon is not None:
            made = planning.within(series, epsilon)
    except BadParameters as error:
        raise Misuse(str(error)) from error
    if as_json:
        put_json(_plain(made))
        return
    put_facts(_facts(made))
    points = [(after, cost) for after, cost in made.curve if math.isfinite(cost)]
    if len(points) > 1:
        put("")
        put_plot("ε after so many rounds", points, x_label="rounds")
        put("")
        put_table(
            ["Rounds", "ε"], [[f"{n:,}", f"{cost:.4g}"] for n, cost in _few(points)], "No round."
        )


@app.command("show")
@guarded
def show(
    population: Annotated[
        str | None,
        typer.Argument(help="Show this one alone.", metavar="[POPULATION]", show_default=False),
    ] = None,
    *,
    delta: Annotated[
        float | None,
        typer.Option(
            help="Judge all at this δ. (default: each at that of the plan charged last; a limit "
            "is shown at its own δ alone)",
            show_default=False,
        ),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show what is spent, by population and unit, and what is left of the limits."""
    if delta is not None and not 0 < delta < 1:
        raise Misuse(f"--delta {delta:g} must be between 0 and 1")
    query = {} if delta is None else {"delta": repr(delta)}
    found = connect(data).get("ledger", query=query)
    if population is not None:
        known = sorted({account["population"] for account in found})
        found = [account for account in found if account["population"] == population]
        if not found:
            raise Failure(
                f"nothing was ever charged to {population!r}; the ledger knows: "
                f"{', '.join(known) or 'nobody yet'}"
            )
    if as_json:
        put_json(found)
        return
    put_table(
        ["Population", "Unit", "Charges", "ε", "ε (RDP)", "Limit", "Left", "δ", "Method"],
        [
            [
                account["population"],
                account["unit"],
                account["charges"],
                _number(account["epsilon"]),
                _number(account["epsilon_rdp"]),
                "" if account["budget"] is None else _number(account["budget"]),
                "" if account["budget"] is None else _number(_left(account)),
                f"{account['delta']:g}",
                account["method"],
            ]
            for account in found
        ],
        "Nothing was ever charged; each round of a run is, before it starts.",
    )
    for account in found:
        _put_burn_down(account)


def _put_burn_down(account: dict[str, Any]) -> None:
    spent = [(n, epsilon) for n, epsilon in account["curve"] if epsilon is not None]
    if len(spent) < 2:  # the table says as much
        return
    whose = f"{account['population']}, per {account['unit']}"
    budget = account["budget"]
    put("")
    if budget is None:
        put_plot(f"{whose}: ε spent", [(0, 0.0), *spent], x_label="charges")
        return
    left = [(0, budget), *((n, max(0.0, budget - epsilon)) for n, epsilon in spent)]
    put_plot(f"{whose}: ε left of {budget:g}", left, x_label="charges")


def _left(account: dict[str, Any]) -> float:
    if account["epsilon"] is None:
        return 0.0
    return max(0.0, float(account["budget"]) - float(account["epsilon"]))


def _plain(made: "Forecast") -> dict[str, object]:
    """Return a forecast as JSON-able data; no ε where none bounds it."""
    series = made.series
    return {
        "population": series.population,
        "cohort": series.cohort,
        "rounds": series.rounds,
        "sampling": series.sampling,
        "delta": series.delta,
        "noise_multiplier": made.noise_multiplier,
        "epsilon": _bounded(made.epsilon),
        "epsilon_rdp": _bounded(made.epsilon_rdp),
        "method": made.method,
        "relation": made.relation,
        "mean_noise": made.mean_noise,
        "device_share": made.device_share,
        "curve": [[rounds, _bounded(epsilon)] for rounds, epsilon in made.curve],
    }


def _facts(made: "Forecast") -> dict[str, object]:
    series = made.series
    return {
        "population": f"{series.population:,} devices",
        "cohort": f"{series.cohort:,} of them a round, {_drawn(series)}",
        "rounds": f"{series.rounds:,}",
        "δ": f"{series.delta:g}",
        "noise multiplier": f"{made.noise_multiplier:g}",
        "ε": f"{_number(_bounded(made.epsilon))} ({made.method})",
        "ε by Rényi": _number(_bounded(made.epsilon_rdp)),
        "holds for": _HOLDS[made.relation],
        "noise on the mean": f"{made.mean_noise:.4g} × clipping norm",
        "a device's share": f"{made.device_share:.4g} × clipping norm or more, if devices add it",
    }


def _drawn(series: "Series") -> str:
    if series.sampling == "poisson":
        share = series.cohort / series.population
        return (
            f"each with probability {share:.4g}, in secret (a run is charged so with "
            'noise = "central" and min_devices well below the cohort alone)'
        )
    if series.sampling == "fixed":
        return "exactly so many, drawn in secret (no plan draws cohorts so; for comparison)"
    return "chosen in the open"


def _few(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the first point, the last, and some between."""
    count = min(ROWS, len(points))
    return [points[round((len(points) - 1) * i / (count - 1))] for i in range(count)]


def _bounded(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _number(epsilon: float | None) -> str:
    return "not bounded" if epsilon is None else f"{epsilon:.4g}"
