"""``atoll privacy``: reckoned without a hub, and read from a real one."""

import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert
from typer.testing import CliRunner

from atoll.privacy.accounting import gaussian_epsilon
from atoll.privacy.ledger import Gaussian, Ledger, Unnoised
from atoll.server.cli import app
from atoll.server.cli_plot import put_plot, ticks
from atoll.server.ledger_store import SqlLedgerStore
from atoll.server.schema import runs

THOUSAND = ["--population", "1000", "--cohort", "100", "--rounds", "100", "--delta", "1e-6"]
SMALL = ["--cohort", "1", "--rounds", "1", "--epsilon", "1"]


def atoll(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "90"})


def plan(*arguments):
    said = atoll("privacy", "plan", *THOUSAND, *arguments, "--json")
    assert said.exit_code == 0, said.stderr
    return json.loads(said.stdout)


@pytest.mark.parametrize(
    ("sampling", "epsilon", "epsilon_rdp"),
    [("none", 96.72, 100.72), ("poisson", 8.06, 8.92), ("fixed", 86.24, 86.24)],
)
def test_golden(sampling, epsilon, epsilon_rdp):
    got = plan("--sampling", sampling, "--noise-multiplier", "1")
    assert (round(got["epsilon"], 2), round(got["epsilon_rdp"], 2)) == (epsilon, epsilon_rdp)
    assert got["noise_multiplier"] == 1.0
    assert got["delta"] == 1e-6
    assert got["mean_noise"] == 0.01
    assert got["device_share"] == 0.1
    assert got["curve"][-1] == [100, got["epsilon"]]


def test_noise_is_found_for_an_epsilon_and_keeps_within_it():
    found = plan("--epsilon", "8")
    assert found["epsilon"] <= 8
    again = plan("--noise-multiplier", str(found["noise_multiplier"]))
    assert again == found


def test_the_default_sampling_is_none_and_the_default_delta_small_enough():
    said = atoll("privacy", "plan", "--population", 400, *SMALL, "--json")
    got = json.loads(said.stdout)
    assert got["sampling"] == "none"
    assert got["delta"] == 1 / 4000


def test_a_person_is_shown_facts_a_plot_and_a_table():
    said = atoll("privacy", "plan", *THOUSAND, "--noise-multiplier", "8")
    assert said.exit_code == 0, said.stderr
    facts = dict(line.split("  ", 1) for line in said.stdout.splitlines()[:10])
    assert facts["cohort"].strip() == "100 of them a round, chosen in the open"
    epsilon = f"{gaussian_epsilon(10 / 8, 1e-6):.4g}"
    assert facts["ε"].strip() == f"{epsilon} (closed form)"
    assert "there or left out" in facts["holds for"]
    assert "ε after so many rounds" in said.stdout
    assert any("\N{BRAILLE PATTERN BLANK}" < character < "⣿" for character in said.stdout)
    assert "\x1b" not in said.stdout
    assert ["100", epsilon] in [line.split() for line in said.stdout.splitlines()]


def test_what_no_epsilon_bounds_is_said_so():
    said = atoll("privacy", "plan", *THOUSAND, "--noise-multiplier", "1e-200")
    assert said.exit_code == 0, said.stderr
    assert "not bounded" in said.stdout
    assert plan("--noise-multiplier", "1e-200")["epsilon"] is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--noise-multiplier", "1", "--epsilon", "1"], "one of --noise-multiplier and --epsilon"),
        ([], "one of --noise-multiplier and --epsilon"),
        (["--epsilon", "0"], "epsilon 0.0 must be positive"),
        (["--epsilon", "nan"], "epsilon nan"),
        (["--noise-multiplier", "-1"], "noise_multiplier -1.0 must be positive"),
        (["--epsilon", "1", "--delta", "0.001"], "below 1/1000"),
        (["--epsilon", "1", "--cohort", "1001"], "cohort 1001 must be between"),
        (["--epsilon", "1", "--rounds", "0"], "rounds 0 must be at least 1"),
        (["--epsilon", "1", "--population", "0"], "population 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(arguments, complaint):
    said = atoll("privacy", "plan", *THOUSAND, *arguments)
    assert said.exit_code == 2
    assert complaint in said.stderr
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("\n") == 1


def test_a_population_of_nobody_is_told_though_its_delta_is_left_to_us():
    said = atoll("privacy", "plan", "--population", 0, *SMALL)
    assert (said.exit_code, said.stderr) == (2, "error: population 0 must be at least 1\n")


def test_an_unknown_sampling_is_wrong_usage():
    assert atoll("privacy", "plan", *THOUSAND, "--epsilon", 1, "--sampling", "all").exit_code == 2


def test_planning_needs_no_hub_and_loads_no_torch():
    code = (
        "import sys\n"
        "from atoll.server.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'flwr', 'fastapi', 'sqlalchemy', 'plotext'} & {*sys.modules}))\n"
    )
    environment = {**os.environ, "ATOLL_URL": "http://127.0.0.1:9", "ATOLL_TOKEN": "x"}
    done = subprocess.run(
        [sys.executable, "-c", code, "privacy", "plan", *THOUSAND, "--epsilon", "8"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.splitlines()[-1] == "['plotext']"


@given(st.floats(0, 1e4), st.floats(1e-3, 1e6), st.sampled_from([0.0, 1.0]))
def test_ticks_are_few_round_numbers_within(low, width, least):
    found = ticks(low, low + width, least)
    assert len(found) <= 7
    assert all(-1e-6 <= (tick - low) / width <= 1 + 1e-6 for tick in found)
    if least:
        assert all(tick == int(tick) for tick in found)


@pytest.mark.parametrize(
    ("points", "row"),
    [
        ([(0, 0.0), (1, 0.0)], None),
        ([(1, 5.0)], None),
        ([(0, 8.0), (4, 0.0)], "8┤"),
        ([(0, 0.0), (1000, 4321.0)], "4000┤"),
    ],
)
def test_any_points_make_a_plot_within_its_width(points, row, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    put_plot("\x1b[31mred", points, x_label="x")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 60
    if row:
        assert any(line.lstrip().startswith(row) for line in shown.splitlines())


@pytest.fixture(scope="session")
def charged(running):
    """Charges of three accounts in the running hub's ledger."""
    context = running.hub.context
    held = SqlLedgerStore(context.store, context.clock)
    for number in range(1, 4):
        Ledger(held, "cli-knee", None, 1e-5).charge(f"k/{number}", Gaussian(8.0))
    for number in range(1, 3):
        Ledger(held, "cli-knee", None, 1e-5, "row").charge(f"rows/{number}", Gaussian(20.0))
    Ledger(held, "cli-plain", None, 1e-5).charge("p/1", Unnoised())
    return ["--data", str(context.settings.data)]


def test_what_is_spent_is_shown_by_population_and_unit(charged):
    said = atoll("privacy", "show", "cli-knee", *charged)
    assert said.exit_code == 0, said.stderr
    rows = [line.split() for line in said.stdout.splitlines() if line.startswith("cli-knee ")]
    assert [row[:3] for row in rows] == [["cli-knee", "device", "3"], ["cli-knee", "row", "2"]]
    assert "cli-knee, per device: ε spent" in said.stdout
    assert "cli-knee, per row: ε spent" in said.stdout
    assert "cli-plain" not in said.stdout


def test_a_limit_burns_down(running, charged):
    with running.hub.context.store.begin() as connection:
        connection.execute(
            insert(runs).values(
                id="cli-burn",
                plan='name = "b"\ntask = "spar"\nmodel = "b"\n[privacy]\nbudget_epsilon = 4.0\n',
                name="b",
                model="cli-burning",
                state="failed",
                created_at=1.0,
                created_by="test",
                metrics={},
            )
        )
    held = SqlLedgerStore(running.hub.context.store, running.hub.context.clock)
    for number in (1, 2):
        Ledger(held, "cli-burning", 4.0, 1e-5).charge(f"cli-burn/{number}", Gaussian(8.0))
    said = atoll("privacy", "show", "cli-burning", *charged)
    assert said.exit_code == 0, said.stderr
    assert "cli-burning, per device: ε left of 4" in said.stdout
    (row,) = [line.split() for line in said.stdout.splitlines() if line.startswith("cli-burning ")]
    epsilon = gaussian_epsilon(math.sqrt(2) / 8, 1e-5)
    assert row[3] == f"{epsilon:.4g}"
    assert row[5:7] == ["4", f"{4 - epsilon:.4g}"]
    # The line begins at the limit, above the first mark below it.
    lines = said.stdout.splitlines()
    top = next(i for i, line in enumerate(lines) if line.lstrip().startswith("4┤"))
    assert "\N{BRAILLE PATTERN BLANK}" < lines[top].partition("┤")[2][0] < "⣿"


def test_a_ledger_in_json_is_the_apis(charged):
    device, row = json.loads(atoll("privacy", "show", "cli-knee", "--json", *charged).stdout)
    assert (device["unit"], row["unit"]) == ("device", "row")
    assert [charges for charges, _ in device["curve"]] == [1, 2, 3]
    assert device["curve"][-1][1] == device["epsilon"]
    at_another = json.loads(
        atoll("privacy", "show", "cli-knee", "--delta", "1e-9", "--json", *charged).stdout
    )
    assert at_another[0]["delta"] == 1e-9
    assert at_another[0]["epsilon"] > device["epsilon"]


def test_a_sum_without_noise_is_shown_as_not_bounded(charged):
    said = atoll("privacy", "show", *charged)
    (line,) = [line for line in said.stdout.splitlines() if line.startswith("cli-plain ")]
    assert "not bounded" in line
    (account,) = json.loads(atoll("privacy", "show", "cli-plain", "--json", *charged).stdout)
    assert account["epsilon"] is None
    assert account["curve"] == [[1, None]]


def test_a_population_that_was_never_charged_is_told_with_those_that_were(charged):
    said = atoll("privacy", "show", "cli-nee", *charged)
    assert said.exit_code == 1
    assert "'cli-nee'" in said.stderr
    assert "cli-knee, cli-plain" in said.stderr


@pytest.mark.parametrize("delta", ["0", "1", "nan"])
def test_a_delta_that_is_none_is_told_before_any_network(delta, tmp_path):
    said = atoll("privacy", "show", "--delta", delta, "--data", tmp_path)
    assert said.exit_code == 2
    assert "--delta" in said.stderr
