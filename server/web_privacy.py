"""What the privacy page shows: the ledger judged by the accountants, in plain words.

ε is computed from the recorded events each time, as :mod:`atoll.privacy.ledger` says; what the
tables add is which run was charged, and with it δ, the limit and the size of the cohort.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Connection, select

from atoll.federation.errors import BadPlan
from atoll.federation.plan import Privacy, loads
from atoll.privacy.accounting import (
    Event,
    Gaussian,
    Spent,
    Unnoised,
    from_json,
    gaussian_epsilon,
    spent,
)
from atoll.server import schema
from atoll.server.web_charts import plot
from atoll.server.web_format import Tone
from atoll.server.web_read import first, rows

STRONG: Final = 1.0
WEAK: Final = 10.0
"""Up to the first ε is strong, over the second weak (Ponomareva et al., "How to DP-fy ML")."""
METHODS: Final = {
    "nothing spent": "nothing spent",
    "closed form": "exact for Gaussian noise",
    "pld": "from the privacy loss distribution",
    "rdp": "no finer bound than Rényi's",
    "unbounded": "a sum went without noise",
}
"""How ε was computed, in words."""
_RAISED: Final = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
POINTS: Final = 120
"""At most so many points of the curve are computed."""


def privacy(connection: Connection) -> dict[str, Any]:
    """Return each population's account."""
    table = schema.ledger.c
    by_population: dict[str, list[dict[str, Any]]] = {}
    for row in rows(connection, select(schema.ledger).order_by(table.id)):
        by_population.setdefault(row["population"], []).append(row)
    return {
        "populations": [
            account(name, charges, *_terms(connection, name, charges))
            for name, charges in by_population.items()
        ]
    }


def summary(connection: Connection) -> dict[str, float | None]:
    """Return ε and its limit for the population charged last; ε is none without a charge."""
    table = schema.ledger.c
    last = first(connection, select(table.population).order_by(table.id.desc()).limit(1))
    if last is None:
        return {"epsilon": None, "budget": None}
    mine = select(schema.ledger).where(table.population == last["population"]).order_by(table.id)
    charges = rows(connection, mine)
    terms, _ = _terms(connection, last["population"], charges)
    events = tuple(from_json(charge["event"]) for charge in charges)
    return {"epsilon": _spent(events, terms.delta).epsilon_pld, "budget": terms.budget_epsilon}


def account(
    population: str, charges: Sequence[Mapping[str, Any]], terms: Privacy, cohort: int | None
) -> dict[str, Any]:
    """Return one population's account: what was spent, after each charge, and what it means."""
    events = tuple(from_json(charge["event"]) for charge in charges)
    total = _spent(events, terms.delta)
    curve = _curve(events, terms.delta)
    finite = [(n, epsilon) for n, epsilon in curve.items() if math.isfinite(epsilon)]
    series: dict[str, Sequence[float | None]] = {"ε spent": [epsilon for _, epsilon in finite]}
    if terms.budget_epsilon is not None:
        series["limit"] = [terms.budget_epsilon] * len(finite)
    return {
        "population": population,
        "charges": [
            {
                "charge": charge["charge"],
                "event": _words(event),
                "epsilon": curve.get(i + 1),
                "at": charge["at"],
            }
            for i, (charge, event) in enumerate(zip(charges, events, strict=True))
        ],
        "epsilon_pld": total.epsilon_pld,
        "epsilon_rdp": total.epsilon_rdp,
        "method": METHODS[total.method],
        "delta": terms.delta,
        "budget": terms.budget_epsilon,
        "unnoised": math.isinf(total.epsilon_pld),
        "tone": "ok"
        if total.epsilon_pld <= STRONG
        else "wait"
        if total.epsilon_pld <= WEAK
        else "warn",
        "sentence": sentence(events, total, cohort),
        "plot": plot([float(n) for n, _ in finite], series, x_label="charge", from_zero=True)
        if finite
        else None,
    }


def sentence(events: Sequence[Event], total: Spent, cohort: int | None) -> str:
    """Say what an ε means, and what cohort would make it small at the same accuracy.

    The noise on a mean of n devices is z·C/n, so at the same noise on the mean n grows with z;
    Gaussians compose as 1/z² = Σ 1/zᵢ² (see :mod:`atoll.privacy.accounting`).
    """
    if math.isinf(total.epsilon_pld):
        plain = sum(isinstance(event, Unnoised) for event in events)
        return (
            f"{plain} of {len(events)} sums were opened without noise, so no ε bounds what they "
            "reveal about a device. Encryption can hide single updates; it never hides their sum."
        )
    meaning = (
        "Who sees the models can tell that a device took part at odds of at most "
        f"{_odds(total.epsilon_pld)}, but for a chance of {total.delta:g}."
    )
    if total.epsilon_pld <= STRONG:
        return f"This is strong. {meaning}"
    if total.epsilon_pld > WEAK:
        meaning = f"ε = {total.epsilon_pld:.3g} promises little. {meaning}"
    fixed = [e.noise_multiplier for e in events if isinstance(e, Gaussian) and e.sampling is None]
    if cohort is None or len(fixed) < len(events):
        return f"{meaning} More noise or a larger cohort lowers it."
    now = math.sqrt(math.fsum(1 / z**2 for z in fixed))
    needed = math.ceil(cohort * now / _mu_for(STRONG, total.delta))
    return (
        f"{meaning} A cohort of {cohort} cannot do better at this accuracy: with the same noise on "
        f"the mean, ε = 1 takes about {needed:,} devices."
    )


def _tone(epsilon: float) -> Tone:
    if epsilon <= STRONG:
        return "ok"
    return "wait" if epsilon <= WEAK else "warn"


def _odds(epsilon: float) -> str:
    """Return e^ε to one as people say it."""
    if epsilon > 20:
        return f"e{f'{epsilon:.0f}'.translate(_RAISED)} to 1"
    odds = math.exp(epsilon)
    return f"{odds:.1f} to 1" if odds < 10 else f"{odds:,.0f} to 1"


@lru_cache(maxsize=64)
def _mu_for(epsilon: float, delta: float) -> float:
    """Return the sensitivity over σ that costs ``epsilon`` at ``delta``."""
    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        if gaussian_epsilon(middle, delta) <= epsilon:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=512)
def _spent(events: tuple[Event, ...], delta: float) -> Spent:
    return spent(events, delta)


def _curve(events: tuple[Event, ...], delta: float) -> dict[int, float]:
    """Return ε after some of the charges, the last among them: number of charges → ε."""
    step = max(1, math.ceil(len(events) / POINTS))
    at = sorted({*range(step, len(events) + 1, step), len(events)})
    return {n: _spent(events[:n], delta).epsilon_pld for n in at}


def _words(event: Event) -> str:
    if isinstance(event, Unnoised):
        return "a sum without noise"
    sampled = "" if event.sampling is None else f", each device with probability {event.sampling:g}"
    return f"Gaussian noise, σ = {event.noise_multiplier:g} × sensitivity{sampled}"


def _terms(
    connection: Connection, population: str, charges: Sequence[Mapping[str, Any]]
) -> tuple[Privacy, int | None]:
    """Return the privacy terms and the cohort of the run that was charged last.

    A charge names its run; where no run is found the defaults of a plan stand.
    """
    r, o = schema.runs.c, schema.rounds.c
    recent = rows(connection, select(r.id, r.plan, r.model, r.name).order_by(r.created_at.desc()))
    last = charges[-1]["charge"]
    mine = next((run for run in recent if run["id"] in last), None) or next(
        (run for run in recent if population in (run["model"], run["name"])), None
    )
    if mine is None:
        return Privacy(), None
    survivors = select(o.survivors).where(o.run == mine["id"]).order_by(o.round.desc()).limit(1)
    done = first(connection, survivors)
    try:
        terms = loads(mine["plan"]).privacy
    except BadPlan:  # of another version
        terms = Privacy()
    return terms, len(done["survivors"]) if done else None
