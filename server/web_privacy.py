"""What the privacy page shows: each account of the ledger, and in plain words what it means."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Connection

from atoll.privacy.accounting import (
    Event,
    FixedSample,
    Gaussian,
    Spent,
    Unnoised,
    gaussian_epsilon,
)
from atoll.privacy.ledger import Unit
from atoll.server.accounts import Account, accounts, latest
from atoll.server.web_charts import plot
from atoll.server.web_format import Tone

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
HIDDEN: Final[Mapping[Unit, tuple[str, str, str]]] = {
    "device": ("models", "a device", "took part"),
    "example": ("models", "an example", "was trained on"),
    "row": ("counts", "a served row", "was counted"),
}
"""What is released, whom a promise about it is made to, and what it hides about them."""
_RAISED: Final = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def privacy(connection: Connection) -> dict[str, Any]:
    """Return the accounts, as the page shows them."""
    return {"accounts": [view(account) for account in accounts(connection)]}


def summary(connection: Connection) -> dict[str, float | None]:
    """Return ε and its limit for the devices charged last; ε is none without a charge."""
    last = latest(connection)
    if last is None:
        return {"epsilon": None, "budget": None}
    return {"epsilon": last.spent.epsilon_pld, "budget": last.terms.budget_epsilon}


def view(account: Account) -> dict[str, Any]:
    """Return what was spent on an account, after each charge, and what it means."""
    total, curve, budget = account.spent, account.curve, account.terms.budget_epsilon
    finite = [(n, epsilon) for n, epsilon in curve.items() if math.isfinite(epsilon)]
    series: dict[str, Sequence[float | None]] = {"ε spent": [epsilon for _, epsilon in finite]}
    if budget is not None:
        series["limit"] = [budget] * len(finite)
    charges = zip(account.charges, account.events, account.at, strict=True)
    return {
        "population": account.population,
        "unit": account.unit,
        "charges": [
            {"charge": charge, "event": _words(event), "epsilon": curve.get(i), "at": at}
            for i, (charge, event, at) in enumerate(charges, start=1)
        ],
        "epsilon_pld": total.epsilon_pld,
        "epsilon_rdp": total.epsilon_rdp,
        "method": METHODS[total.method],
        "replaced": total.relation == "replace-one",
        "delta": total.delta,
        "budget": budget,
        "left": None if budget is None else max(0.0, budget - total.epsilon_pld),
        "unnoised": math.isinf(total.epsilon_pld),
        "tone": _tone(total.epsilon_pld),
        "sentence": sentence(account.events, total, account.terms.cohort, account.unit),
        "plot": plot([float(n) for n, _ in finite], series, x_label="charge", from_zero=True)
        if len(finite) > 1
        else None,
    }


def sentence(
    events: Sequence[Event], total: Spent, cohort: int | None, unit: Unit = "device"
) -> str:
    """Say what an ε means, and what cohort would make it small at the same accuracy.

    The noise on a mean of n devices is z·C/n, so at the same noise on the mean n grows with z;
    Gaussians compose as 1/z² = Σ 1/zᵢ² (see :mod:`atoll.privacy.accounting`).
    """
    released, whom, deed = HIDDEN[unit]
    if math.isinf(total.epsilon_pld):
        plain = sum(isinstance(event, Unnoised) for event in events)
        if unit == "row":
            return (
                f"Under {plain} of {len(events)} releases devices tell what they count without "
                f"noise, so no ε bounds what that reveals about {whom}. telemetry_noise in a plan "
                "adds it."
            )
        return (
            f"{plain} of {len(events)} sums were opened without noise, so no ε bounds what they "
            f"reveal about {whom}. Encryption can hide single updates; it never hides their sum."
        )
    meaning = (
        f"Who sees the {released} can tell that {whom} {deed} at odds of at most "
        f"{_odds(total.epsilon_pld)}, but for a chance of {total.delta:g}."
    )
    if total.epsilon_pld <= STRONG:
        return f"This is strong. {meaning}"
    if total.epsilon_pld > WEAK:
        meaning = f"ε = {total.epsilon_pld:.3g} promises little. {meaning}"
    if unit != "device":
        return f"{meaning} More noise lowers it."
    whole = [e for e in events if isinstance(e, Gaussian) and e.sampling is None]
    if cohort is None or len(whole) < len(events):
        return f"{meaning} More noise or a larger cohort lowers it."
    now = math.sqrt(math.fsum(e.times / e.noise_multiplier**2 for e in whole))
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


def _words(event: Event) -> str:
    if isinstance(event, Unnoised):
        return "a sum without noise"
    drawn = ""
    if isinstance(event.sampling, FixedSample):
        drawn = f", {event.sampling.size:,} of {event.sampling.population:,} drawn in secret"
    elif event.sampling is not None:
        drawn = f", each with probability {event.sampling:g}"
    times = "" if event.times == 1 else f"{event.times:,} times "
    return f"{times}Gaussian noise, σ = {event.noise_multiplier:g} × sensitivity{drawn}"
