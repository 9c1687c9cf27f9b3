"""What may be claimed for a round, and what is refused before one starts."""

import pytest
from cohorts import plan_of, varied
from scipy import stats

from atoll.federation import release
from atoll.federation.plan import Plan
from atoll.privacy.errors import BadParameters


def sampled(rate: float = 0.1, least: int = 50, **privacy: object) -> Plan:
    plan = plan_of(noise=1.0, least=least, count=100)
    return varied(plan, cohort={"sampling_rate": rate}, privacy={"noise": "central", **privacy})


def test_amplification_is_claimed_for_a_large_fleet_with_central_noise() -> None:
    plan = sampled(least=40)
    assert release.amplification(plan, 1000) == 0.1
    assert release.devices(plan, 1000, 1000, 93) == pytest.approx(100)
    # With a quarter of it away, the mean is still over those that were to be expected.
    assert release.amplification(sampled(least=20), 750) == 0.1
    assert release.devices(sampled(least=20), 1000, 750, 71) == pytest.approx(100)


@pytest.mark.parametrize("connected", [0, 1, 100, 500, 700, 800])
def test_amplification_is_not_claimed_when_too_many_are_away(connected: int) -> None:
    assert release.amplification(sampled(least=40), connected) is None
    assert release.devices(sampled(least=40), 1000, connected, 60) == 60


@pytest.mark.parametrize(
    ("plan", "trainers"),
    [
        (plan_of(noise=1.0), 1000),
        (sampled(rate=1.0), 1000),
        (sampled(noise="distributed"), 1000),
        (sampled(noise_multiplier=0.0), 1000),
        (sampled(least=95), 1000),
        (sampled(rate=0.5, least=2), 8),
    ],
    ids=["everyone", "rate 1", "distributed", "no noise", "close to the edge", "small fleet"],
)
def test_amplification_is_claimed_nowhere_else(plan: Plan, trainers: int) -> None:
    assert release.amplification(plan, trainers) is None
    assert release.devices(plan, trainers, trainers, 7) == 7


@pytest.mark.parametrize("least", range(30, 80))
def test_the_edge_is_where_thrown_away_rounds_would_show_in_delta(least: int) -> None:
    plan = sampled(least=least)
    shows = 100 * 0.1 * stats.binom.pmf(least - 1, 899, 0.1)  # a tenth may drop out
    assert (release.amplification(plan, 1000) is not None) == (shows <= 1e-7)


def test_a_delta_that_gives_a_device_away_is_refused() -> None:
    plan = plan_of(noise=1.0)
    release.check_population(plan, 99_999)
    with pytest.raises(BadParameters, match="allows to give one of 100000"):
        release.check_population(plan, 100_000)
    release.check_population(plan_of(), 100_000)  # without noise δ says nothing


def test_a_rate_that_hardly_ever_draws_enough_is_refused() -> None:
    release.check_population(sampled(rate=0.05, least=50), 1000)
    with pytest.raises(
        BadParameters, match=r"raise cohort\.sampling_rate or lower cohort\.min_devices"
    ):
        release.check_population(sampled(rate=0.049, least=50), 1000)


@pytest.mark.parametrize(
    ("privacy", "says"),
    [
        ({"bits": 4, "noise_multiplier": 0.3}, "raise privacy.bits"),
        ({"noise_multiplier": 1.0, "clip": "adaptive", "rider_noise_multiplier": 1e9}, "no step"),
    ],
)
def test_noise_that_cannot_be_drawn_is_refused(privacy: dict[str, object], says: str) -> None:
    with pytest.raises(BadParameters, match=says):
        release.check(varied(plan_of(), privacy=privacy))
