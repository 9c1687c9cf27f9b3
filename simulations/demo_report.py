"""What the demo found, gathered into plain facts and shown as tables.

Every number comes from the running fleet (the hub's API) or from the comparison that ran
beside it; the published figures are marked as such.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from atoll.federation.plan import Plan
from atoll.privacy.accounting import Gaussian, spent
from atoll.simulations.traffic import Served

PUBLISHED: Final = {"known": 0.996, "unseen": 0.873}
"""Burns et al. 2018 (arXiv 1802.01489v1), the same ten people, cross-validated."""
TARGETS: Final = (8.0, 1.0)
"""ε that people call weak and strong; the report says what cohort would buy them."""
_LARGEST_MULTIPLIER: Final = 1e4


def gather(
    *,
    plan: Plan,
    run: Mapping[str, Any],
    release: int,
    devices: Mapping[str, Mapping[str, Any]],
    memory: Mapping[str, Mapping[str, int]],
    unseen: Collection[str],
    drift: Mapping[str, Mapping[str, Any]],
    served: tuple[Mapping[str, Served], Mapping[str, Served]],
    turned: str,
    alerts: Sequence[Mapping[str, Any]],
    proposed: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any],
    ledger: Sequence[Mapping[str, Any]],
    url: str,
) -> dict[str, Any]:
    """Return the facts of the demo, JSON-able."""
    usual, after = served
    seconds = [one["seconds"] for one in run["rounds"]]
    trainers = len(devices) - len(unseen)
    return {
        "run": run["id"],
        "model": plan.model,
        "release": release,
        "accuracy": {
            "fleet": run["metrics"]["accuracy"],
            "federated_without_noise": reference["federated"],
            "central": reference["central"],
            "published": PUBLISHED,
        },
        "gates": run["metrics"].get("gates", []),
        "privacy": {
            **next(iter(ledger), {}),
            "mode": plan.privacy.mode,
            "noise_multiplier": plan.privacy.noise_multiplier,
            "cohort": trainers,
            "cohort_for": {f"{target:g}": cohort_for(plan, trainers, target) for target in TARGETS},
        },
        "rounds": {"count": len(seconds), "median_seconds": statistics.median(seconds)},
        "devices": {
            name: {
                "role": "unseen" if name in unseen else "known",
                "turned": name == turned,
                "bytes_up": device["https_up"] + device["mqtt_up"],
                "bytes_down": device["https_down"],
                "peak_rss": dict(memory[name]),
                "drift": {key: drift[name][key] for key in ("state", "score", "rows")},
                "served": {
                    "rows": usual[name].rows + after[name].rows,
                    "accuracy_before": usual[name].accuracy,
                    "accuracy_after": after[name].accuracy,
                },
            }
            for name, device in devices.items()
        },
        "alerts": [alert["text"] for alert in alerts],
        "proposed_runs": [one["id"] for one in proposed],
        "url": url,
    }


def multiplier_for(epsilon: float, rounds: int, delta: float) -> float:
    """Return the noise multiplier that keeps ``rounds`` unsampled rounds within ``epsilon``."""
    low, high = 1e-3, _LARGEST_MULTIPLIER
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        if spent([Gaussian(middle)] * rounds, delta).epsilon_pld > epsilon:
            low = middle
        else:
            high = middle
    return high


def cohort_for(plan: Plan, cohort: int, epsilon: float) -> int | None:
    """Return the cohort that has ``epsilon`` with as little noise on the average as here.

    Noise on the sum is fixed by ε; its share in the average falls with the cohort. None for
    a plan without noise.
    """
    if plan.privacy.noise_multiplier == 0:
        return None
    needed = multiplier_for(epsilon, plan.rounds, plan.privacy.delta)
    return round(cohort * needed / plan.privacy.noise_multiplier)


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Print the facts as tables."""
    console.print()
    console.print(_accuracy(facts["accuracy"]))
    console.print(_devices(facts["devices"]))
    for line in _sentences(facts):
        console.print(line, highlight=False, soft_wrap=True)


def _accuracy(accuracy: Mapping[str, Any]) -> Table:
    table = Table(title="Accuracy", title_justify="left")
    table.add_column("")
    table.add_column("known people", justify="right")
    table.add_column("unseen people", justify="right")
    table.caption = "known people: windows that were held back from training"
    fleet = accuracy["fleet"]
    for name, key in (("this fleet, float", "float"), ("this fleet, int8", "int8")):
        table.add_row(name, *(f"{fleet[side][key]:.1%}" for side in ("known", "unseen")))
    for name, key in (
        ("federated without noise, same net", "federated_without_noise"),
        ("trained in one place, same net", "central"),
        ("published (Burns et al. 2018)", "published"),
    ):
        table.add_row(name, *(f"{accuracy[key][side]:.1%}" for side in ("known", "unseen")))
    return table


def _devices(devices: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="Devices", title_justify="left")
    table.add_column("device")
    for name in ("MB up", "MB down", "peak MB: agent", "serving", "training"):
        table.add_column(name, justify="right")
    table.add_column("right", justify="right")
    table.add_column("drift", justify="right")
    table.add_column("")
    for name, device in devices.items():
        memory, drifted = device["peak_rss"], device["drift"]["state"] == "drifted"
        served = device["served"]
        table.add_row(
            name + (" (unseen)" if device["role"] == "unseen" else ""),
            f"{device['bytes_up'] / 1e6:.1f}",
            f"{device['bytes_down'] / 1e6:.1f}",
            *(
                f"{memory[part] / 1e6:.0f}" if part in memory else "–"
                for part in ("control", "serving", "trainer")
            ),
            f"{served['accuracy_before']:.0%} → {served['accuracy_after']:.0%}",
            f"{device['drift']['score']:.2f}",
            device["drift"]["state"] + (", turned" if device["turned"] else ""),
            style="bold red" if drifted else None,
        )
    table.caption = (
        "right: live windows answered rightly, before → after one watch was turned; "
        "drift: largest change over its threshold, 1 or more is drift"
    )
    return table


def _sentences(facts: Mapping[str, Any]) -> list[str]:
    privacy, rounds, gates = facts["privacy"], facts["rounds"], facts["gates"]
    passed = sum(bool(gate["passed"]) for gate in gates)
    median = f"{rounds['median_seconds']:.1f} s each (median)"
    return [
        "",
        f"Rounds: {rounds['count']}, {median}, summed under {privacy['mode']}.",
        _privacy(privacy),
        f"Gates: {passed} of {len(gates)} rules passed; release {facts['release']} is signed.",
        *(f"Alert: {text}" for text in facts["alerts"]),
        *(
            f"Retraining run {run} is proposed and waits for a person's approval."
            for run in facts["proposed_runs"]
        ),
    ]


def _privacy(privacy: Mapping[str, Any]) -> str:
    if privacy.get("epsilon") is None:
        return "Privacy: no noise was added, so no ε bounds what the model reveals."
    spent_so_far = (
        f"ε = {privacy['epsilon']:,.0f} at δ = {privacy['delta']:g} ({privacy['charges']} charges)"
    )
    cohorts = "; ".join(
        f"about {cohort:,} devices for ε = {target}"
        for target, cohort in privacy["cohort_for"].items()
    )
    return (
        f"Privacy: {spent_so_far}. That protects nobody: {privacy['cohort']} devices cannot buy a "
        f"small ε. With as little noise on the average it takes {cohorts}."
    )
