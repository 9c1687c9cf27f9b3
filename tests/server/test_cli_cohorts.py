"""What ``atoll plan show`` prints of cohorts and groups."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dashboard_fleet import METRICS

from atoll.server.cli_cohorts import put_cohorts
from atoll.server.cli_device import told
from atoll.server.cli_progress import outcome


def test_cohorts_and_groups_are_tables_and_no_lines_of_their_own(capsys) -> None:
    assert not any("spread" in name or "fairness" in name for name in outcome({"metrics": METRICS}))
    put_cohorts(METRICS)
    shown = capsys.readouterr().out
    known = next(line for line in shown.splitlines() if line.startswith("known"))
    shares = ["97.0%", "96.9%", "2.1%", "90.9%", "90.9%", "99.5%"]
    assert known.split() == ["known", "8", "1040", *shares]
    assert "equalised odds, difference" in shown
    assert "Not shown: unseen (2 devices, fewer than cohort.min_devices = 3)." in shown
    assert "Left out: watch-05 (device.power = battery)." in shown


def test_a_device_shows_what_it_told_and_nothing_of_what_it_did_not() -> None:
    assert told({"power": "mains", "network": None, "examples": 4096}) == {
        "power": "mains",
        "network": None,
        "accelerator": None,
        "examples": "4,096 or more to train on",
    }
    assert set(told({}).values()) == {None}  # of an agent from before there were facts


def test_a_run_that_knows_nothing_of_them_prints_nothing(capsys) -> None:
    put_cohorts({})
    assert capsys.readouterr().out == ""
