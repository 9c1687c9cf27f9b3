"""An attack on the noise as it runs, which shows when it leaks more than the ledger says.

Canary devices take part in rounds that go the real way, from :func:`atoll.privacy.update.encode`
through a plain sum to :func:`atoll.privacy.update.decode`. Each canary is in the cohort or
replaced by zeros, by the toss of a coin that holds for all rounds, and its update is the worst
there is: a coordinate of its own that nobody else's canary touches, ten times the clipping norm
long, and of the other sign every second round, so that noise that is used twice cancels. The
attacker knows all that, adds up each coordinate with those signs and guesses.
:mod:`atoll.privacy.audit` turns the guesses into a lower bound on ε, which must not pass what
:mod:`atoll.privacy.accounting` reckons.

``python -m atoll.simulations.audit [--json]``; exit status 1 when it does pass.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from atoll.privacy import accounting, audit, modes
from atoll.privacy.keystream import Keystream
from atoll.privacy.plain import PlainParty
from atoll.privacy.sums import Ask, Integers, RoundKey, SumSpec, Total
from atoll.privacy.update import Floats, UpdateSpec, decode, encode, release

CLIP_NORM: Final = 1.0
LOUDNESS: Final = 10.0
"""Length of a canary's update in clipping norms, before it is clipped."""

BITS: Final = 18
DELTA: Final = 1e-5
CONFIDENCE: Final = 0.95
SEED: Final = 1

Mechanism = Callable[[Floats, UpdateSpec, int, int], Integers]
"""What device number ``d`` makes of its update in round ``t``: ``(update, spec, d, t)``."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is audited: ``rounds`` sums of ``noise_multiplier``, over canaries and bystanders.

    ``guesses`` is how many of the canaries the attacker makes up his mind about.
    """

    noise_multiplier: float
    rounds: int
    canaries: int = 600
    bystanders: int = 10
    guesses: int = 80

    @property
    def spec(self) -> UpdateSpec:
        """How the cohort's updates become integers; everybody survives."""
        return UpdateSpec(CLIP_NORM, BITS, self.noise_multiplier, self.canaries + self.bystanders)


@dataclass(frozen=True, slots=True)
class Found:
    """What an audit found: ε is at least ``at_least``, where ``accounted`` was reckoned."""

    noise_multiplier: float
    rounds: int
    guesses: int
    correct: int
    at_least: float
    accounted: float

    @property
    def holds(self) -> bool:
        """Whether the accounted ε survives the attack."""
        return self.at_least <= self.accounted


def as_deployed(seed: int) -> Mechanism:
    """Return what devices do, with noise that can be replayed."""

    def mechanism(update: Floats, spec: UpdateSpec, device: int, round_: int) -> Integers:
        stream = Keystream.replayable((seed << 40) + (round_ << 20) + device)
        return encode(update, spec, stream)

    return mechanism


def attack(setting: Setting, mechanism: Mechanism, seed: int) -> Found:
    """Run the rounds, guess, and hold the bound on ε against the accounted one."""
    rng = np.random.default_rng(seed)
    included = rng.random(setting.canaries) < 0.5
    scores = np.zeros(setting.canaries)
    parties = {
        f"device-{d}": PlainParty(f"device-{d}")
        for d in range(setting.canaries + setting.bystanders)
    }
    for t in range(setting.rounds):
        sign = 1.0 if t % 2 == 0 else -1.0
        canaries = np.diag(included * (sign * LOUDNESS * CLIP_NORM))
        others = rng.normal(size=(setting.bystanders, setting.canaries))
        terms = {
            party: mechanism(update, setting.spec, d, t)
            for d, (party, update) in enumerate(
                zip(parties, np.concatenate([canaries, others]), strict=True)
            )
        }
        scores += sign * _mean(setting, t, parties, terms)
    seen = audit.guess(scores, included, setting.guesses)
    events = [accounting.Gaussian(setting.noise_multiplier)] * setting.rounds
    return Found(
        setting.noise_multiplier,
        setting.rounds,
        seen.made,
        seen.correct,
        audit.epsilon_at_least(seen, DELTA, CONFIDENCE),
        accounting.spent(events, DELTA).epsilon_pld,
    )


def _mean(
    setting: Setting,
    round_: int,
    parties: Mapping[str, PlainParty],
    terms: Mapping[str, Integers],
) -> Floats:
    """Return the mean update of one plain sum.

    The sum lets through more than ``spec.bound``, so that what a mechanism without clipping
    leaks is found by the attack and not hidden by a check that comes later.
    """
    bound = 2 * int(LOUDNESS) * setting.spec.bound
    spec = SumSpec(
        RoundKey("audit", round_), setting.canaries, bound, len(parties), setting.spec.survivors
    )
    hub = modes.hub_session("plain", {}).open(spec, list(parties))
    step: Ask | Total = hub.start()
    while isinstance(step, Ask):
        for party, payload in step.payloads.items():
            hub.receive(party, parties[party].answer(spec, step.phase, payload, terms[party]))
        step = hub.advance()
    # The terms carry all of the noise: nothing is added here, whatever the stream.
    total = release(step.values, setting.spec, Keystream.replayable(0))
    return decode(total, setting.spec).update / len(step.survivors)


SETTINGS: Final = (
    Setting(noise_multiplier=0.7, rounds=1),
    Setting(noise_multiplier=1.0, rounds=1),
    Setting(noise_multiplier=2.0, rounds=4),
    Setting(noise_multiplier=4.0, rounds=1),
    Setting(noise_multiplier=8.0, rounds=6),
)


def main(arguments: list[str] | None = None) -> int:
    """Attack every setting and print what was found; return 1 when an accounted ε fell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args(arguments)
    found = [attack(setting, as_deployed(given.seed), given.seed) for setting in SETTINGS]
    if given.json:
        print(json.dumps([asdict(one) for one in found], indent=2))  # noqa: T201 -- the result
    else:
        _table(found)
    return int(not all(one.holds for one in found))


def _table(found: list[Found]) -> None:
    print(  # noqa: T201 -- the command's result
        f"δ = {DELTA:g}, confidence {CONFIDENCE:.0%}\n"
        "noise multiplier  rounds  right guesses  ε at least  ε accounted"
    )
    for one in found:
        print(  # noqa: T201 -- the command's result
            f"{one.noise_multiplier:>16g}  {one.rounds:>6}  {one.correct:>5} of {one.guesses:<5}"
            f"{one.at_least:>12.2f}  {one.accounted:>11.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
