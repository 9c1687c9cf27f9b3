"""What a run's rounds cost, and the accounts of the ledger that they are charged to.

A round is charged before it starts: to the account of devices, which is the population's, and
where the plan protects single examples to theirs. An example is on one device, so what it spends
does not depend on which devices take part.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from atoll.federation import release
from atoll.federation.plan import Plan
from atoll.privacy.ledger import Event, Gaussian, Ledger, Unnoised


def event_of(plan: Plan, connected: int) -> Event:
    """Return what one round costs its population, ``connected`` trainers of which are there.

    The update and its riders are one release. Sampling counts where it amplifies
    (:func:`atoll.federation.release.amplification`), and nowhere else.
    """
    spec = release.update_spec(plan, plan.privacy.clip_norm)
    if not spec.multiplier:
        return Unnoised()
    return Gaussian(spec.multiplier, release.amplification(plan, connected))


def example_event(plan: Plan) -> Gaussian | None:
    """Return what one round costs an example: so many sampled Gaussians, or nothing asked."""
    asked = plan.privacy.examples
    if asked is None:
        return None
    return Gaussian(asked.noise_multiplier, asked.sampling_rate, times=asked.steps)


@dataclass(frozen=True, slots=True)
class Accounts:
    """The accounts of ``run``: ``devices``, and ``examples`` for a plan that protects those."""

    plan: Plan
    run: str
    devices: Ledger
    examples: Ledger | None

    def charge(self, number: int, connected: int) -> float | None:
        """Charge a round as :data:`atoll.federation.run.Charge` says; return the devices' ε."""
        event = event_of(self.plan, connected)
        # A round taken up again may find others connected, and then costs something else.
        claimed = (
            self.plan.cohort.sampling_rate is None or getattr(event, "sampling", None) is not None
        )
        charge = f"{self.run}/{number}"
        of_example = example_event(self.plan)
        if self.examples is not None and of_example is not None:
            self.examples.charge(f"{charge}/examples", of_example)
        spent = self.devices.charge(charge if claimed else f"{charge}/in-full", event).epsilon_pld
        return spent if isfinite(spent) else None

    def facts(self) -> dict[str, Any]:
        """Return what is spent by now: the facts ``privacy``, ``epsilon`` and ``delta``."""
        wanted, spent = self.plan.privacy, self.devices.spent()
        finite = isfinite(spent.epsilon_pld)
        privacy: dict[str, Any] = {"delta": spent.delta}
        if finite:
            privacy |= {"epsilon": spent.epsilon_pld, "epsilon_rdp": spent.epsilon_rdp}
        if wanted.budget_epsilon is not None:
            privacy["budget"] = wanted.budget_epsilon
        if self.examples is not None and wanted.examples is not None:
            of_examples = self.examples.spent()
            privacy["examples"] = {
                "epsilon": of_examples.epsilon_pld,
                "delta": of_examples.delta,
            }
        return {
            "privacy": privacy,
            "epsilon": spent.epsilon_pld if finite else None,
            "delta": spent.delta,
        }
