"""What one round of a plan releases: how it is made private, and what may be claimed for it.

The plan alone decides this, so hub, ledger and check ask here and cannot differ.
"""

import math
from typing import Final

from atoll.federation import codec
from atoll.federation.plan import Plan
from atoll.federation.riders import Riders
from atoll.privacy import modes
from atoll.privacy.errors import BadParameters
from atoll.privacy.update import UpdateSpec

ABORT_SHARE: Final = 0.01
"""The share of δ by which thrown-away rounds may exceed it in one run."""
LOST_SHARE: Final = 0.1
"""The share of connected devices that are taken to drop out of a round."""


def update_spec(plan: Plan, clip_norm: float) -> UpdateSpec:
    """Return how updates become integers; the noise holds for the least number of survivors."""
    return UpdateSpec(
        clip_norm=clip_norm,
        bits=plan.privacy.bits,
        noise_multiplier=plan.privacy.noise_multiplier,
        survivors=plan.cohort.min_devices,
        colluders=plan.privacy.colluders,
        placement=plan.privacy.noise,
        riders=Riders.of(plan).count,
        rider_noise_multiplier=plan.privacy.rider_noise,
    )


def values(plan: Plan, parameters: int) -> int:
    """Return how many values a term has before what rides, for a model of ``parameters``."""
    return codec.summed(plan.codec, parameters * (2 if plan.training.control_steps else 1))


def rounded(plan: Plan, parameters: int) -> int:
    """Return how many values of a term are rounded; the others are zero as they are."""
    return codec.rounded(plan.codec, parameters * (2 if plan.training.control_steps else 1))


def amplification(plan: Plan, connected: int) -> float | None:
    """Return the sampling probability that the ledger may count on, or none.

    Poisson sampling lowers ε as far as the release does not tell how many took part. Three
    things would tell: a mean over the number of survivors, so it is taken over the expected
    ``q·trainers`` (:func:`devices`); the width of distributed noise, which grows with every
    device in the sum and can be read off thousands of coordinates, so only central noise
    counts; and a round that is thrown away.

    The last cannot be hidden. A device's presence shows when exactly ``min_devices - 1`` others
    take part, and then its round costs what it would without sampling: over all rounds δ
    grows by at most rounds·q·P(Bin(n - 1, q) = min_devices - 1), for ``n`` devices of which any
    that is drawn takes part. They are the ``connected`` trainers, less
    :data:`LOST_SHARE` for those that drop out within the round; it is taken for granted that
    who drops out has nothing to do with who was drawn. Amplification is claimed while that is
    below :data:`ABORT_SHARE` of δ, so with ``min_devices`` some standard deviations below the
    expected cohort; in a small fleet, or when many are away, never.

    Nor under a ``cohort.rule``: what it goes by may follow from a device's data, so who is left
    out of the draw is no secret that the proof could do without.
    """
    rate, privacy = plan.cohort.sampling_rate, plan.privacy
    if plan.cohort.rule is not None:
        return None
    if rate is None or rate == 1 or privacy.noise != "central" or not privacy.noise_multiplier:
        return None
    there, least = int(connected * (1 - LOST_SHARE)), plan.cohort.min_devices
    if there * rate <= least:
        return None
    edge = rate * _binomial(there - 1, least - 1, rate)
    return rate if plan.rounds * edge <= ABORT_SHARE * privacy.delta else None


def devices(plan: Plan, trainers: int, connected: int, survivors: int) -> float:
    """Return the number of devices over which a round's means are taken.

    The survivors, or their expected number where the real one must not show.
    """
    rate = amplification(plan, connected)
    return survivors if rate is None else rate * trainers


def check(plan: Plan) -> None:
    """Raise :class:`BadParameters` for noise that cannot be drawn or that adds up to nothing."""
    update_spec(plan, plan.privacy.clip_norm)


def parties(plan: Plan, trainers: int) -> int:
    """Return for how many devices a round's sum must have room, of so many trainers."""
    # In he a device deals the key to every trainer of the run, whoever is in a round.
    return trainers if plan.privacy.mode == "he" else plan.cohort.in_a_round(trainers)


def check_population(plan: Plan, trainers: int) -> None:
    """Raise :class:`BadParameters` for what cannot work in, or protect, ``trainers`` devices."""
    delta, rate = plan.privacy.delta, plan.cohort.sampling_rate
    spec = update_spec(plan, plan.privacy.clip_norm)
    modes.check_parties(plan.privacy.mode, spec, parties(plan, trainers))
    if plan.privacy.noise_multiplier and delta * trainers >= 1:
        raise BadParameters(
            f"privacy.delta = {delta:g} allows to give one of {trainers} devices away in full; "
            f"set it well below {1 / trainers:.1g}"
        )
    if plan.asynchrony is not None and plan.asynchrony.buffer > trainers:
        raise BadParameters(
            f"asynchrony.buffer = {plan.asynchrony.buffer} is more than the {trainers} devices "
            "that train, and each is in a buffer once: lower asynchrony.buffer"
        )
    enough = plan.cohort.enough
    most = parties(plan, trainers)
    if plan.privacy.mode == "secagg" and enough is not None and 2 * enough <= most:
        raise BadParameters(
            f"cohort.enough = {enough} of {most} devices: masked sums are opened by more than "
            f"half of those who are in them; raise cohort.enough to {most // 2 + 1}"
        )
    if rate is not None and rate * trainers < plan.cohort.min_devices:
        raise BadParameters(
            f"cohort.sampling_rate = {rate:g} draws {rate * trainers:.3g} of {trainers} trainers "
            f"on average and cohort.min_devices = {plan.cohort.min_devices}: most rounds would be "
            "thrown away; raise cohort.sampling_rate or lower cohort.min_devices"
        )


def _binomial(trials: int, successes: int, rate: float) -> float:
    """Return P(Bin(trials, rate) = successes) for 0 < rate < 1."""
    if not 0 <= successes <= trials:
        return 0.0
    logarithm = (
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        + successes * math.log(rate)
        + (trials - successes) * math.log1p(-rate)
    )
    return math.exp(logarithm)
