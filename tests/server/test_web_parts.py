"""The dashboard's pure parts: words, drawings, the loop's states, what an ε means."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.privacy.accounting import FixedSample, Gaussian, Unnoised, spent
from atoll.server.accounts import Account, Terms
from atoll.server.web_access import local_path
from atoll.server.web_charts import HEIGHT, WIDTH, bars, plot
from atoll.server.web_format import FILTERS, TONES, ago
from atoll.server.web_loop import Facts, steps
from atoll.server.web_privacy import sentence, view
from atoll.server.web_runs import accuracy_table, stages

NOW = 1_790_000_000.0


@given(st.text(max_size=40))
def test_a_login_never_leads_to_another_site(wanted):
    path = local_path(wanted)
    assert path.startswith("/")
    assert not path.startswith("//")
    assert "\\" not in path
    assert path.isprintable()


def test_local_paths_are_kept():
    assert local_path("/runs/abc") == "/runs/abc"
    assert local_path("//evil.example") == "/"
    assert local_path("https://evil.example/") == "/"


counts = st.lists(st.integers(0, 1000), min_size=1, max_size=66)


@settings(max_examples=60)
@given(st.lists(counts, min_size=1, max_size=3))
def test_bars_stay_in_the_drawing_and_share_one_scale(histograms):
    drawn = bars(histograms)
    assert len(drawn) == len(histograms)
    for histogram, rects in zip(histograms, drawn, strict=True):
        assert len(rects) <= len(histogram)
        for bar in rects:
            assert 0 <= bar.x <= bar.x + bar.width <= WIDTH + 0.02 * len(histogram)
            assert 0 <= bar.y <= bar.y + bar.height <= HEIGHT + 0.02
    if any(map(sum, histograms)):
        assert max(bar.height for rects in drawn for bar in rects) == HEIGHT


def test_a_plot_leaves_out_what_is_not_finite():
    text = plot([1, 2, 3], {"ε": [1.0, float("inf"), None]}, x_label="round")
    assert json.loads(text)["series"][0]["y"] == [1.0, None, None]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num", 37.283, "37.3"),
        ("num", 0.8, "0.800"),
        ("num", 1e-5, "1e-5"),
        ("num", 60.0, "60"),
        ("num", float("inf"), "∞"),
        ("num", None, "–"),
        ("num", 1234.5, "1234"),
        ("size", 0, "0 B"),
        ("size", 1536, "1.5 KiB"),
        ("size", 3 * 1024**5, "3072.0 TiB"),
        ("percent", 0.9714, "97.1\u202f%"),
        ("duration", 4.24, "4.2 s"),
        ("duration", 160, "2 min 40 s"),
        ("duration", 7500, "2 h 5 min"),
        ("moment", 0.0, "1970-01-01 00:00:00"),
        ("label", "gated", "waits for signing"),
        ("tone", "drifted", "bad"),
        ("tone", "unheard of", "idle"),
    ],
)
def test_values_are_said_briefly(name, value, said):
    assert FILTERS[name](value) == said


def test_times_are_said_by_distance():
    assert [ago(NOW - s, NOW) for s in (0, 59, 60, 7200, 200_000)] == [
        "now",
        "59 s ago",
        "1 min ago",
        "2 h ago",
        "2 days ago",
    ]
    assert ago(NOW + 3700, NOW) == "in 1 h"
    assert ago(None, NOW) == "never"


def test_every_step_of_the_loop_has_a_known_state():
    def words(facts: Facts) -> list[str]:
        found = steps(facts)
        assert [step.name for step in found] == [
            "Train",
            "Gate",
            "Sign",
            "Roll out",
            "Serve",
            "Watch",
        ]
        assert all(step.state in TONES for step in found)
        return [step.state for step in found]

    nothing = Facts(run=None, rounds=0, release=None, rollout=None, devices=[], proposed=False)
    assert words(nothing) == ["idle"] * 6
    run = {"id": "r", "name": "p", "rounds": 4, "stage": "train", "reason": "", "gates": []}
    training = Facts(
        run=run | {"state": "running"}, rounds=2, release=None, rollout=None, devices=[],
        proposed=False,
    )  # fmt: skip
    assert words(training)[:3] == ["running", "waiting", "idle"]
    gated = Facts(
        run=run | {"state": "gated", "gates": [{"passed": True}, {"passed": True}]},
        rounds=4, release=None, rollout=None, devices=[], proposed=False,
    )  # fmt: skip
    assert words(gated)[:3] == ["done", "passed", "gated"]
    assert steps(gated)[1].text == "2 of 2 gates hold"
    device = {
        "id": "a", "model": "m", "release": 1, "serving_state": "serving", "drift_state": "drifted",
    }  # fmt: skip
    served_ = Facts(
        run=run | {"state": "published"}, rounds=4,
        release={"model": "m", "release": 1},
        rollout={"model": "m", "release": 1, "state": "done", "reason": "", "targets": ["a", "b"]},
        devices=[device, device | {"id": "b", "drift_state": "stable"}], proposed=True,
    )  # fmt: skip
    assert words(served_) == ["done", "passed", "published", "done", "serving", "drifted"]
    assert steps(served_)[5].text == "1 of 2 devices; a run is proposed"


def test_stages_before_the_present_one_are_done():
    found = dict(stages({"stage": "export", "state": "running"}))
    assert (found["train"], found["export"], found["gate"]) == ("done", "running", "later")
    assert set(dict(stages({"stage": "gate", "state": "published"})).values()) == {"done"}


def test_accuracy_is_read_either_way_round():
    by_split = {"known": {"float": 0.9, "int8": 0.8}}
    by_precision = {"float": {"known": 0.9}, "int8": {"known": 0.8}}
    assert accuracy_table({"accuracy": by_split}) == by_split
    assert accuracy_table({"accuracy": by_precision}) == by_split
    assert accuracy_table({"accuracy": "none"}) == {}


def test_the_privacy_page_names_the_cohort_that_would_make_epsilon_one():
    events = [Gaussian(0.8)] * 12
    said = sentence(events, spent(events, 1e-5), cohort=8)
    named = re.search(r"takes about ([\d,]+) devices", said)
    assert named
    devices = int(named[1].replace(",", ""))
    # The same noise on a mean of so many devices is this much larger on the sum.
    larger = [Gaussian(0.8 * devices / 8)] * 12
    assert spent(larger, 1e-5).epsilon_pld <= 1.0
    smaller = [Gaussian(0.8 * (devices - 2) / 8)] * 12
    assert spent(smaller, 1e-5).epsilon_pld > 1.0


def test_so_many_releases_at_once_need_the_same_cohort_as_one_by_one():
    one_by_one = [Gaussian(0.8)] * 12
    at_once = [Gaussian(0.8, times=12)]
    total = spent(one_by_one, 1e-5)
    assert sentence(at_once, total, cohort=8) == sentence(one_by_one, total, cohort=8)


def charged(events, unit="device", budget=None):
    charges = [f"r/{number}" for number in range(1, len(events) + 1)]
    at = [float(number) for number in range(1, len(events) + 1)]
    return Account("all", unit, charges, tuple(events), at, Terms(1e-5, budget, 8))


def test_an_account_burns_its_budget_down():
    total = spent([Gaussian(8.0)] * 2, 1e-5).epsilon_pld
    found = view(charged([Gaussian(8.0)] * 2, budget=3.0))
    assert found["left"] == pytest.approx(3.0 - total)
    assert view(charged([Gaussian(8.0)] * 2, budget=total / 2))["left"] == 0.0
    assert [charge["epsilon"] for charge in found["charges"]] == [
        pytest.approx(spent([Gaussian(8.0)] * n, 1e-5).epsilon_pld) for n in (1, 2)
    ]


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ("device", "the models can tell that a device took part"),
        ("example", "the models can tell that an example was trained on"),
        ("row", "the counts can tell that a served row was counted"),
    ],
)
def test_each_unit_is_told_what_is_hidden_about_it(unit, words):
    found = view(charged([Gaussian(1.0)], unit))
    assert words in found["sentence"]
    # A larger cohort is the remedy for devices alone.
    assert ("cohort" in found["sentence"]) == (unit == "device")


def test_events_are_told_in_words():
    events = [Gaussian(1.5, 0.1, 20), Gaussian(1.5, FixedSample(100, 1000)), Unnoised()]
    assert [charge["event"] for charge in view(charged(events))["charges"]] == [
        "20 times Gaussian noise, σ = 1.5 × sensitivity, each with probability 0.1",
        "Gaussian noise, σ = 1.5 × sensitivity, 100 of 1,000 drawn in secret",
        "a sum without noise",
    ]


def test_a_sum_without_noise_has_no_epsilon():
    found = view(charged([Gaussian(2.0), Unnoised()]))
    assert found["unnoised"]
    assert "no ε bounds" in found["sentence"]
    assert found["charges"][0]["epsilon"] == pytest.approx(spent([Gaussian(2.0)], 1e-5).epsilon_pld)
    assert "1 of 2 sums" in sentence([Gaussian(2.0), Unnoised()], spent([Unnoised()], 1e-5), None)
