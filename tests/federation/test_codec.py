"""Smaller updates: what is sent of them, what is kept, and what comes out of the sum."""

import itertools
import math
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from blobs import Blobs, write
from cohorts import fleet, plan_of, varied
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from atoll.federation import codec, local_update, messages, parameters, plan, release
from atoll.federation.checkpoints import Checkpoints
from atoll.federation.codec import WHOLE, Sketch
from atoll.federation.errors import BadMessage, BadPlan
from atoll.federation.evaluation import evaluate
from atoll.federation.kept import Carried, KeptHere
from atoll.federation.plan import Aggregation, Codec, Plan, Training
from atoll.federation.riders import Riders
from atoll.federation.run import RoundReport
from atoll.federation.task import Examples, Split
from atoll.privacy import frames, update
from atoll.privacy.errors import BadUpdate, Refused
from atoll.privacy.keystream import Keystream
from atoll.privacy.ring import Ring
from atoll.privacy.sums import CONTRIBUTE, RoundKey, SumSpec
from atoll.privacy.update import Noised, UpdateSpec

LENGTH = 74  # weights of Blobs' model
MASK, TOP = Codec("random-mask", 0.5), Codec("top-k", 0.1)
FED_BACK = Codec("random-mask", 0.5, error_feedback=True)
FINE = UpdateSpec(clip_norm=100.0, bits=24, noise_multiplier=0.0, survivors=1)


def coded(made: Plan, how: Codec) -> Plan:
    return msgspec.structs.replace(made, codec=how)


# --- which coordinates ------------------------------------------------------------------------


@given(st.integers(1, 500), st.floats(0.001, 1.0), st.integers(0, 2**40), st.text(max_size=9))
def test_a_mask_is_a_share_of_the_coordinates_each_once(
    length: int, share: float, seed: int, run: str
) -> None:
    places = codec.mask(length, share, seed, run, 3)
    assert places.size == codec.count(length, share) == max(1, math.ceil(length * share))
    assert (np.diff(places) > 0).all()
    assert 0 <= places[0] <= places[-1] < length
    assert np.array_equal(places, codec.mask(length, share, seed, run, 3))


def test_every_set_of_coordinates_is_as_likely_as_another() -> None:
    drawn = Counter(tuple(codec.mask(5, 0.4, 1, "run", number).tolist()) for number in range(2000))
    assert set(drawn) == set(itertools.combinations(range(5), 2))
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


def test_masks_of_rounds_runs_and_seeds_have_nothing_in_common() -> None:
    drawn = [codec.mask(1000, 0.5, seed, run, n) for seed in (1, 2) for run in "ab" for n in (1, 2)]
    for one, other in itertools.combinations(drawn, 2):
        # Hypergeometric: 250 in common, with a deviation of 7.9.
        assert 210 < np.intersect1d(one, other).size < 290


def test_over_all_masks_the_mean_is_that_of_the_whole() -> None:
    """In closed form: the average of what is spread, over every set of three of six, is exact."""
    mean = np.array([3.0, -1.0, 0.5, 8.0, 0.0, -2.25])
    spread = [
        codec.spread(MASK, mean[list(places)], np.array(places), 6)
        for places in itertools.combinations(range(6), 3)
    ]
    np.testing.assert_allclose(np.mean(spread, axis=0), mean, rtol=1e-12)
    # What comes later is not multiplied: it would come twice.
    kept = codec.spread(FED_BACK, mean[[0, 3]], np.array([0, 3]), 6)
    assert kept.tolist() == [3.0, 0, 0, 8.0, 0, 0]


@given(st.lists(st.sampled_from([-2.0, -1.5, -0.0, 0.0, 1.5, 2.0, 7.0]), min_size=1, max_size=30))
def test_the_largest_are_those_that_a_sort_finds(values: list[float]) -> None:
    for share in (0.01, 0.3, 1.0):
        wanted = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
        kept = codec.count(len(values), share)
        assert codec.top(values, share).tolist() == sorted(wanted[:kept])


# --- error feedback ---------------------------------------------------------------------------


@given(
    st.sampled_from(["random-mask", "top-k"]),
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.sampled_from([0, 10]),
    st.sampled_from([7, 16, 24]),
    st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_what_was_decoded_adds_up_to_the_changes_less_the_last_residual(
    kind: plan.CodecKind, rounds: list[bool], cap: int, bits: int, seed: int
) -> None:
    """Rounds that did not count are as if they had never been; rounding is fed back too."""
    length, rng, draws = 40, np.random.default_rng(seed), Keystream.replayable(seed)
    spec = UpdateSpec(50.0, bits, 0.0, 1, riders=1 if cap else 0)
    riders, carried = Riders(cap), Carried(KeptHere(), "run", "residual")
    counted, changes, decoded = 0, np.zeros(length), np.zeros(length)
    for number, counts in enumerate(rounds, start=1):
        before = carried.as_of(counted, lambda: np.zeros(length, np.float32))
        places = codec.mask(length, 0.3, 1, "run", number)
        sketch = Sketch(kind, 0.3, places if kind == "random-mask" else None, before)
        change = rng.normal(size=length).astype(np.float32)
        made = local_update.encoded(change, 4, 1, Training(), riders, spec, draws, sketch)
        assert made.residual is not None
        carried.put(number, before, made.residual)
        if counts:
            counted, changes = number, changes + change
            sums = update.decode(Noised(made.term), spec)
            placed = np.zeros(length)
            if kind == "top-k":
                assert np.count_nonzero(sums.update) <= codec.count(length, 0.3)
                placed = sums.update
            else:
                placed[places] = sums.update
            decoded += placed / riders.weight(4)
    last = carried.as_of(counted, lambda: np.zeros(length, np.float32))
    # A residual is float32, and so is the change that came to it.
    np.testing.assert_allclose(decoded, changes - last, atol=1e-4)


def test_what_clipping_cuts_off_is_not_kept() -> None:
    spec = UpdateSpec(1.0, 24, 0.0, 1)
    change = np.array([3.0, 0.1, 4.0, 0.2], np.float32)
    sketch = Sketch("top-k", 0.5, None, np.zeros(4, np.float32))
    made = local_update.encoded(
        change, 1, 1, Training(), Riders(), spec, Keystream.replayable(0), sketch
    )
    decoded = update.decode(Noised(made.term), spec).update
    np.testing.assert_allclose(decoded, [0.6, 0, 0.8, 0], atol=1e-6)
    assert made.residual is not None
    np.testing.assert_allclose(made.residual, [0, 0.1, 0, 0.2], atol=1e-6)


def test_noise_is_not_taken_back() -> None:
    """A residual that held the noise would undo it in the next round."""
    spec = UpdateSpec(10.0, 20, 5.0, 1)
    change = np.random.default_rng(0).normal(size=100).astype(np.float32)
    sketch = Sketch("random-mask", 0.5, np.arange(50), np.zeros(100, np.float32))
    made = local_update.encoded(change, 1, 1, Training(), Riders(), spec, Keystream.fresh(), sketch)
    assert np.abs(made.term / spec.scale - change[:50]).max() > 20  # σ is 50
    assert made.residual is not None
    assert np.abs(made.residual[:50]).max() <= 1 / spec.scale + 1e-6
    assert np.array_equal(made.residual[50:], change[50:])


@pytest.mark.parametrize("kind", ["random-mask", "top-k"])
@given(st.floats(1e-3, 1e6), st.integers(0, 2**32))
@settings(max_examples=30)
def test_no_term_is_longer_than_the_sensitivity_whatever_was_kept(
    kind: plan.CodecKind, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    spec = UpdateSpec(1.0, 12, 0.0, 1)
    places = np.arange(20) if kind == "random-mask" else None
    sketch = Sketch(kind, 0.2, places, (size * rng.normal(size=100)).astype(np.float32))
    made = local_update.encoded(
        rng.normal(size=100), 1, 1, Training(), Riders(), spec, Keystream.fresh(), sketch
    )
    assert int(made.term @ made.term) <= spec.sensitivity**2
    assert made.term.size == (20 if kind == "random-mask" else 100)


def test_whether_an_update_is_within_the_clipping_norm_is_asked_of_what_is_sent() -> None:
    change = np.array([0.6, 100.0, 0.6], np.float32)
    spec = UpdateSpec(1.0, 16, 0.0, 1, riders=1)
    for places, within in (([0, 2], 1), ([0, 1], -1)):
        sketch = Sketch("random-mask", 0.6, np.array(places))
        made = local_update.encoded(
            change, 1, 1, Training(), Riders(0, 0.5), spec, Keystream.fresh(), sketch
        )
        assert made.term[-1] == within * spec.rider_steps


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_diverged_where_it_is_not_sent_is_refused(bad: float) -> None:
    change = np.array([1.0, bad, 1.0], np.float32)
    for sketch in (Sketch("random-mask", 0.6, np.array([0, 2])), Sketch("top-k", 0.1), WHOLE):
        with pytest.raises(BadUpdate, match="NaN or Inf"):
            local_update.encoded(
                change, 1, 1, Training(), Riders(), FINE, Keystream.fresh(), sketch
            )


# --- plans and devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[codec]\nkind = "top-k"', "codec.share belongs"),
        ("[codec]\nshare = 0.5", "codec.share belongs"),
        ('[codec]\nkind = "top-k"\nshare = 0', "share"),
        ('[codec]\nkind = "random"\nshare = 0.5', "kind"),
        ("[codec]\nerror_feedback = true", "nothing is left out"),
        (
            '[codec]\nkind = "top-k"\nshare = 0.5',
            'codec.kind = "top-k" with privacy.mode = "secagg"',
        ),
        (
            '[codec]\nkind = "top-k"\nshare = 0.5\n[privacy]\nmode = "plain"\nnoise_multiplier = 1',
            "falls on every coordinate",
        ),
        (
            (
                '[codec]\nkind = "top-k"\nshare = 0.5\n[privacy]\nmode = "plain"\n'
                '[cohort]\nmin_devices = 4\n[aggregation]\nrule = "median"\nbyzantine = 1'
            ),
            "leaves updates out",
        ),
        (
            '[codec]\nkind = "random-mask"\nshare = 0.5\n[training]\ncontrol_steps = 4',
            "control variates",
        ),
        (
            (
                "asynchrony = { buffer = 4, concurrency = 4 }\n"
                '[codec]\nkind = "random-mask"\nshare = 0.5\n[privacy]\nmode = "plain"'
            ),
            "codec.kind is for rounds",
        ),
        ('[codec]\ndownlink = "float8"', "downlink"),
    ],
)
def test_codecs_that_tell_too_much_or_lose_something_are_refused(text: str, says: str) -> None:
    with pytest.raises(BadPlan, match=says):
        plan.loads(f'name = "p"\ntask = "t"\nmodel = "m"\n{text}\n')


def test_feedback_is_what_top_k_has_and_a_mask_has_not_unless_asked() -> None:
    assert [one.feedback for one in (Codec(), MASK, FED_BACK, TOP)] == [False, False, True, True]
    assert not Codec("top-k", 0.1, error_feedback=False).feedback


def asks(
    how: Codec, mode: str = "plain", number: int = 1, counted: int = 0
) -> tuple[messages.TrainAsk, messages.SumAsk]:
    weights = parameters.flatten(Blobs().model(7))
    work = messages.TrainAsk(
        task="blobs",
        weights=parameters.to_bytes(weights),
        seed=7,
        local_epochs=1,
        batch_size=16,
        learning_rate=0.1,
        momentum=0.9,
        clip_norm=2.0,
        bits=24,
        noise_multiplier=0.0,
        codec=how.kind,
        codec_share=how.share or 1.0,
        feedback=how.feedback,
    )
    ask = messages.SumAsk(
        mode=mode,
        phase="contribute",
        payload=b"",
        party="device-1",
        run="run",
        round=number,
        length=LENGTH,
        bound=1,
        parties=2,
        min_survivors=2,
        counted=counted,
    )
    return work, ask


def test_a_device_does_not_say_which_are_its_largest_where_terms_are_hidden(tmp_path: Path) -> None:
    data = write(tmp_path / "one", 1)
    work, ask = asks(TOP, "secagg")
    with pytest.raises(Refused, match="largest"):
        local_update.make(Blobs(), data, work, ask, KeptHere())
    ask = msgspec.structs.replace(ask, mode="plain")
    noisy = msgspec.structs.replace(work, noise_multiplier=1.0)
    with pytest.raises(Refused, match="would not hide"):
        local_update.make(Blobs(), data, noisy, ask, KeptHere())
    bare = msgspec.structs.replace(noisy, noise="central")
    term, _ = local_update.make(Blobs(), data, bare, ask, KeptHere())
    assert np.count_nonzero(term) == codec.count(LENGTH, 0.1)
    for share in (0.0, 1.5, -1.0, math.nan):
        odd = msgspec.structs.replace(work, codec_share=share)
        with pytest.raises(BadMessage, match="share"):
            local_update.make(Blobs(), data, odd, ask, KeptHere())


def test_a_term_that_did_not_count_leaves_what_was_kept(tmp_path: Path) -> None:
    data, kept = write(tmp_path / "one", 1), KeptHere()
    spec = local_update.spec_of(*asks(TOP))

    def made(number: int, counted: int) -> np.ndarray:
        term, _ = local_update.make(Blobs(), data, *asks(TOP, "plain", number, counted), kept)
        return term / spec.scale

    def residual(counted: int) -> np.ndarray:
        return Carried(kept, "run", "residual").as_of(counted, lambda: np.zeros(LENGTH, np.float32))

    def change(number: int) -> np.ndarray:
        work, ask = asks(Codec(), "plain", number)
        whole, _ = local_update.make(Blobs(), data, work, ask, KeptHere())
        return whole / spec.scale

    first = made(1, 0)
    after = residual(1)
    np.testing.assert_allclose(first + after, change(1), atol=1e-5)
    # Round 2 is lost, and asked again, and lost again: round 3 begins with what round 1 left.
    made(2, 1)
    assert np.array_equal(residual(1), after)
    made(2, 1)
    assert np.array_equal(residual(1), after)
    third = made(3, 1)
    np.testing.assert_allclose(third + residual(3), change(3) + after, atol=1e-5)
    # Round 1 did not count either, as the hub says after a restart: then nothing was kept.
    assert np.abs(after).max() > 0


# --- rounds -----------------------------------------------------------------------------------


class Smooth(Blobs):
    """Without normalisation over batches, whose biases and statistics are no ordinary weights."""

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 14), nn.Tanh(), nn.Linear(14, 2))


def reports_of(
    root: Path, made: Plan, task: Blobs | None = None
) -> tuple[np.ndarray, list[RoundReport]]:
    reports: list[RoundReport] = []
    tasks = dict.fromkeys(("device-1", "device-2", "device-3"), task or Blobs())
    done = fleet(root, 3, tasks).run(made, on_round=reports.append, task=task)
    return done.weights, reports


@pytest.mark.parametrize("how", [MASK, FED_BACK])
def test_all_modes_come_to_the_same_weights(tmp_path: Path, how: Codec) -> None:
    found = [
        reports_of(tmp_path / mode, coded(plan_of(mode, count=3), how))[0]
        for mode in ("plain", "he", "secagg")
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0], reports_of(tmp_path / "whole", plan_of(count=3))[0])


def test_one_round_moves_the_masked_coordinates_and_by_the_whole_over_the_part(
    tmp_path: Path,
) -> None:
    fine = varied(plan_of(count=1), privacy={"bits": 24})
    before = parameters.flatten(Blobs().model(7))
    whole = reports_of(tmp_path / "a", fine)[0] - before
    places = codec.mask(LENGTH, 0.5, 7, "run", 1)
    for how, factor in ((MASK, 2.0), (FED_BACK, 1.0)):
        part = reports_of(tmp_path / how.kind / str(factor), coded(fine, how))[0] - before
        assert not part[np.setdiff1d(np.arange(LENGTH), places)].any()
        np.testing.assert_allclose(part[places], factor * whole[places], atol=1e-5)


@pytest.mark.parametrize(
    ("how", "learning"),
    [
        (MASK, {}),
        (FED_BACK, {}),
        (TOP, {}),
        (Codec("top-k", 0.05), {"weighting": "capped", "weight_cap": 100}),
        (Codec(downlink="float16"), {}),
        (Codec("random-mask", 0.25, error_feedback=True, downlink="float16"), {"step_cap": 8}),
    ],
)
def test_a_cohort_learns_from_smaller_updates(
    tmp_path: Path, how: Codec, learning: dict[str, object]
) -> None:
    here = fleet(tmp_path, 3, dict.fromkeys(("device-1", "device-2", "device-3"), Smooth()))
    made = varied(coded(plan_of(count=12), how), training={"server_momentum": 0.0, **learning})
    done = here.run(made, task=Smooth())
    replies = evaluate(here.of(made), done.weights).values()
    assert sum(one.correct for one in replies) / sum(one.rows for one in replies) > 0.9


def test_a_mask_goes_with_weights_an_adaptive_norm_and_a_robust_rule(tmp_path: Path) -> None:
    riding = varied(
        coded(plan_of("secagg", count=3), MASK),
        training={"weighting": "capped", "weight_cap": 100},
        privacy={"clip": "adaptive"},
    )
    weights, reports = reports_of(tmp_path / "a", riding)
    assert np.isfinite(weights).all()
    assert len({one.clip_norm for one in reports}) == 3
    robust = msgspec.structs.replace(
        coded(plan_of(count=3, least=3), MASK), aggregation=Aggregation("median", 1)
    )
    before = parameters.flatten(Blobs().model(7))
    one = msgspec.structs.replace(robust, rounds=1)
    moved = np.flatnonzero(reports_of(tmp_path / "b", one)[0] - before)
    assert set(moved) <= set(codec.mask(LENGTH, 0.5, 7, "run", 1).tolist())
    assert len(moved) > 30


class Wide(Blobs):
    """Has some five thousand weights."""

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 1000), nn.Linear(1000, 2))


@pytest.mark.parametrize("noise", ["distributed", "central"])
def test_noise_is_that_of_the_clipping_norm_over_the_mask_alone(tmp_path: Path, noise: str) -> None:
    tasks = {f"device-{number}": Wide() for number in (1, 2, 3)}
    made = varied(
        coded(plan_of("secagg", count=1, least=3, noise=0.5), Codec("random-mask", 0.5)),
        training={"learning_rate": 1e-9, "server_momentum": 0.0},
        privacy={"noise": noise},
    )
    before = parameters.flatten(Wide().model(7))
    moved = fleet(tmp_path, 3, tasks).run(made, task=Wide()).weights - before
    places = codec.mask(before.size, 0.5, 7, "run", 1)
    assert np.count_nonzero(np.delete(moved, places)) == 0
    # σ = 0.5 of a norm of 2 on the sum of three, doubled as the mask is a half.
    sigma = 0.5 * 2.0 / 3 * before.size / places.size
    assert np.std(moved[places]) == pytest.approx(sigma, rel=0.06)


class BrokenOff(Blobs):
    """Ends the hub's process, as it were, in the middle of round 2."""

    calls = 0

    def load(self, data: Path, split: Split) -> Examples:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return super().load(data, split)


@pytest.mark.parametrize("how", [FED_BACK, TOP])
def test_a_round_that_broke_off_is_repeated_exactly_with_what_devices_keep(
    tmp_path: Path, how: Codec
) -> None:
    made = coded(plan_of(count=4), how)
    undisturbed = reports_of(tmp_path / "a", made)[0]
    here = fleet(tmp_path / "b", 3, {"device-3": BrokenOff()})
    with pytest.raises(KeyboardInterrupt):
        here.run(made, checkpoints=Checkpoints(tmp_path / "run"))
    done = here.run(made, checkpoints=Checkpoints(tmp_path / "run"))
    assert np.array_equal(done.weights, undisturbed)


# --- bytes ------------------------------------------------------------------------------------


def framed(*sizes: int) -> int:
    """Return the bytes of a contribution with parts of these sizes."""
    head = frames.address(RoundKey("run", 1), CONTRIBUTE, "device-1")
    return len(frames.pack(head, [bytes(size) for size in sizes]))


def test_the_bytes_of_a_round_are_those_of_what_is_sent(tmp_path: Path) -> None:
    """Sixteen bits a value up and thirty-two down, for three devices; heads are told apart."""
    plans = {"whole": Codec(), "mask": MASK, "top": TOP, "half": Codec(downlink="float16")}
    whole, masked, top, half = (
        reports_of(tmp_path / name, coded(plan_of(count=1), how), Smooth())[1][0]
        for name, how in plans.items()
    )
    length = parameters.flatten(Smooth().model(7)).size
    assert length == 72
    assert whole.bytes_down - 3 * 4 * length == half.bytes_down - 3 * 2 * length
    assert masked.bytes_down == top.bytes_down == whole.bytes_down
    assert half.bytes_up == whole.bytes_up
    assert whole.bytes_up == 3 * framed(2 * length)
    assert masked.bytes_up == 3 * framed(2 * 36)
    # Eight of 72: a byte for each gap, one that says so, and two for each value.
    assert codec.count(length, 0.1) == 8
    assert top.bytes_up == 3 * framed(1 + 8, 2 * 8)


def test_masked_sums_shrink_by_the_ring(tmp_path: Path) -> None:
    _, (whole,) = reports_of(tmp_path / "a", plan_of("secagg", count=1))
    _, (masked,) = reports_of(tmp_path / "b", coded(plan_of("secagg", count=1), MASK))
    spec = release.update_spec(plan_of("secagg"), 2.0)
    sizes = [
        Ring.of(SumSpec(RoundKey("run", 1), length, spec.bound, 3, 2)).size
        for length in (LENGTH, 37)
    ]
    saved = (whole.bytes_up - masked.bytes_up) / 3
    assert saved == pytest.approx(sizes[0] - sizes[1], abs=16)  # heads are padded
    assert sizes == [25 * 7, 13 * 7]  # three values of 17.6 bits in seven bytes


def test_the_length_that_rounding_is_checked_for_is_what_is_rounded() -> None:
    made = plan_of()
    lengths = [
        (release.values(coded(made, how), 1000), release.rounded(coded(made, how), 1000))
        for how in (Codec(), MASK, TOP)
    ]
    assert lengths == [(1000, 1000), (500, 500), (1000, 100)]


def test_weights_that_half_precision_holds_are_rounded_and_a_torn_vector_is_refused() -> None:
    vector = np.array([1.0, -65504.0, 1e-3, 1 / 3], np.float32)
    data, number = parameters.downlink(vector, "float16")
    assert (len(data), number) == (8, "float16")
    assert np.abs(parameters.from_bytes(data, number) / vector - 1).max() <= 2.0**-11
    with pytest.raises(BadMessage, match="no float16"):
        parameters.from_bytes(b"123", "float16")


class Huge(Blobs):
    """Begins with a weight that float16 does not hold, and that no gradient reaches."""

    def model(self, seed: int) -> nn.Module:
        made = super().model(seed)
        made.register_parameter("apart", nn.Parameter(torch.tensor([100_000.0])))
        return made


def test_weights_too_large_for_half_precision_travel_whole_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    vector = np.array([1 / 3, 70_000.0], np.float32)
    data, number = parameters.downlink(vector, "float16")
    assert number == "float32"
    assert np.array_equal(parameters.from_bytes(data, number), vector)
    halved = coded(plan_of(count=2), Codec(downlink="float16"))
    weights, reports = reports_of(tmp_path / "half", halved, Huge())
    whole, whole_reports = reports_of(tmp_path / "whole", plan_of(count=2), Huge())
    assert np.array_equal(weights, whole)
    assert weights[0] == 100_000
    assert [one.bytes_down for one in reports] == [one.bytes_down for one in whole_reports]
    assert all(len(one.survivors) == 3 for one in reports)
