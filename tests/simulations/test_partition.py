"""A dealt data set is on devices whole and once, and as uneven as the papers have it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.federation.errors import BadPlan
from atoll.federation.task import Examples
from atoll.simulations import partition, populations

TEN = np.repeat(np.arange(10), 6000)
"""As many labels as Fashion-MNIST has, in another order, which sizes do not depend on."""


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    devices=st.integers(1, 12),
    alpha=st.sampled_from([0.3, 0.5, 5.0]),
    counts=st.lists(st.integers(60, 300), min_size=4, max_size=8),
)
def test_every_example_is_on_one_device_and_each_has_the_least(seed, devices, alpha, counts):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = partition.dealt(labels, devices, alpha, seed)
    assert len(parts) == devices
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert min(map(len, parts)) >= partition.LEAST
    again = partition.dealt(labels, devices, alpha, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_a_device_with_its_even_share_gets_nothing_of_later_classes() -> None:
    """But for one example that rounding may leave to the last device, as in the published deal."""
    for seed in range(20):
        for device, part in enumerate(partition.dealt(TEN, 10, 0.5, seed)):
            counts = np.bincount(TEN[part], minlength=10)
            before = np.cumsum(counts) - counts
            assert counts[before >= 6000].max(initial=0) <= (device == 9)


def test_shares_are_of_a_dirichlet_distribution() -> None:
    """Of the first class, where nobody is full: moments 1/N and (α + 1)/(N·(Nα + 1))."""
    devices, alpha, seeds = 8, 0.5, 600
    labels = np.repeat(np.arange(20), 500)
    shares = np.array(
        [
            [np.sum(labels[part] == 0) / 500 for part in partition.dealt(labels, devices, alpha, s)]
            for s in range(seeds)
        ]
    )
    # A cut is rounded down to whole examples, so that all shares but the last are near exact.
    first = shares[:, 0]
    spread = np.sqrt((devices - 1) / (devices**2 * (devices * alpha + 1)))
    assert np.mean(first) == pytest.approx(1 / devices, abs=4 * spread / np.sqrt(seeds))
    second = np.mean(np.sum(shares**2, axis=1))
    expected = (alpha + 1) / (devices * alpha + 1)
    error = np.std(np.sum(shares**2, axis=1)) / np.sqrt(seeds)
    assert second == pytest.approx(expected, abs=4 * error)


def test_alpha_says_how_even_devices_are() -> None:
    def largest_class(alpha):
        parts = partition.dealt(TEN, 10, alpha, 0)
        return np.mean([np.bincount(TEN[part]).max() / len(part) for part in parts])

    assert largest_class(100.0) < 0.15 < 0.35 < largest_class(0.5)


def test_the_seed_of_flowers_baseline_deals_its_devices() -> None:
    """As niid_bench's own procedure deals 60,000 images with its seed, 42."""
    sizes = [len(part) for part in partition.dealt(TEN, 10, 0.5, 42)]
    assert sizes == [6370, 2405, 6357, 6470, 7449, 6873, 4416, 8072, 4399, 7189]


def test_too_few_examples_for_so_many_devices_are_refused() -> None:
    with pytest.raises(BadPlan, match="simulate fewer devices"):
        partition.dealt(np.repeat(np.arange(3), 30), 10, 0.5, 0)


def test_weights_are_evaluated_on_the_test_set_once_and_not_on_devices() -> None:
    rng = np.random.default_rng(0)
    held = tuple(Examples(rng.random((3, 2), np.float32), np.arange(3)) for _ in range(4))
    tested_on = Examples(rng.random((7, 2), np.float32), np.arange(7))
    dealt = partition.DealtPopulation(held, tested_on)
    assert list(populations.evaluated_on(dealt, 50)) == [tested_on]
    assert [dealt.examples(device, "train") for device in range(dealt.size)] == list(held)
    drawn = populations.named("digits", 7, 0).population
    asked = list(populations.evaluated_on(drawn, 3))
    assert [len(one.y) for one in asked] == [
        len(drawn.examples(device, "test").y) for device in (0, 2, 4)
    ]
