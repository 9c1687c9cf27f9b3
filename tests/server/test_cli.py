"""The command line without a hub: what it loads, what it says, what it ends with."""

import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atoll.server import settings
from atoll.server.cli import app
from atoll.server.client import default_data

PROGRAM = [sys.executable, "-c", "from atoll.server.cli import main; main()"]
CONSOLE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


@pytest.fixture
def atoll(tmp_path, monkeypatch):
    """Run a command in this process, in an environment without any hub."""
    for name in ("ATOLL_DATA", "ATOLL_URL", "ATOLL_TOKEN", "ATOLL_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))

    def run(*arguments, **environment):
        return CliRunner().invoke(app, list(map(str, arguments)), env={**CONSOLE, **environment})

    return run


def write_operator_file(directory, url):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "operator.json").write_text(json.dumps({"url": url, "token": "secret"}))
    return directory


def test_help_and_completion_load_nothing_heavy():
    code = (
        "import sys; from atoll.server import cli; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "torch",
        "flwr",
        "fastapi",
        "sqlalchemy",
        "numpy",
        "httpx",
        "onnx",
        "cryptography",
        "plotext",
    }
    assert heavy.isdisjoint(loaded)


def test_version_is_that_of_the_package(atoll):
    assert atoll("--version").stdout == "atoll 0.1.0\n"


def test_help_lists_every_group_and_the_exit_statuses(atoll):
    said = atoll("--help")
    assert said.exit_code == 0
    for word in ("hub", "login", "demo", "device", "plan", "model", "privacy", "keys", "3: no hub"):
        assert word in said.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["hub"],
        ["login"],
        *(["device", it] for it in ("token", "list", "show", "revoke")),
        *(["plan", it] for it in ("run", "list", "show", "approve", "cancel")),
        *(["model", it] for it in ("list", "publish", "roll-out", "roll-back")),
        *(["privacy", it] for it in ("plan", "show")),
        ["keys", "init"],
        ["simulate"],
    ],
    ids=" ".join,
)
def test_every_command_explains_itself(atoll, command):
    said = atoll(*command, "--help")
    assert said.exit_code == 0
    assert "Usage" in said.stdout


def test_completion_completes():
    environment = {
        **os.environ,
        "_ATOLL_COMPLETE": "complete_bash",
        "COMP_WORDS": "atoll device re",
        "COMP_CWORD": "2",
    }
    said = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["revoke"]


def test_the_default_data_directory_is_the_hubs(monkeypatch, tmp_path):
    for data_home in (None, str(tmp_path)):
        if data_home is None:
            monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_DATA_HOME", data_home)
        environment = {name: value for name, value in os.environ.items() if name != "ATOLL_DATA"}
        assert default_data(environment) == settings.default_data(environment)
    assert default_data({"ATOLL_DATA": "/x"}) == settings.default_data({"ATOLL_DATA": "/x"})


def test_without_a_hub_it_says_how_to_start_one(atoll, tmp_path):
    said = atoll("device", "list", "--data", tmp_path)
    assert said.exit_code == 3
    assert said.stdout == ""
    assert said.stderr.count("\n") == 1
    assert f"{tmp_path}/operator.json" in said.stderr
    assert "`atoll hub`" in said.stderr


def test_a_hub_that_has_gone_is_unreachable(atoll, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        write_operator_file(tmp_path, url)
        said = atoll("device", "list", "--data", tmp_path)
    assert said.exit_code == 3
    assert url in said.stderr
    assert "connection refused" in said.stderr
    assert "`atoll hub`" in said.stderr


def test_a_name_that_does_not_resolve_is_unreachable(atoll):
    said = atoll("login", ATOLL_URL="http://no-such-host.invalid:8080", ATOLL_TOKEN="x")
    assert said.exit_code == 3
    assert "$ATOLL_URL" in said.stderr


class Stranger(BaseHTTPRequestHandler):
    """Answers as some other web server might."""

    def do_GET(self):
        body = b"<html>It works!</html>"
        self.send_response(404 if "show" in self.path else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("command", [["device", "list"], ["device", "show", "show"]])
def test_another_web_server_is_no_hub(atoll, tmp_path, command):
    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        write_operator_file(tmp_path, f"http://127.0.0.1:{server.server_port}")
        said = atoll(*command, "--data", tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert said.exit_code == 3
    assert "is not an Atoll hub" in said.stderr


def test_something_that_does_not_speak_http_is_no_hub(atoll, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        write_operator_file(tmp_path, f"http://127.0.0.1:{listener.getsockname()[1]}")
        said = atoll("login", "--data", tmp_path)
        thread.join()
    assert said.exit_code == 3
    assert "is not an Atoll hub" in said.stderr


@pytest.mark.parametrize(
    ("environment", "lacking"),
    [({"ATOLL_URL": "http://x"}, "ATOLL_TOKEN"), ({"ATOLL_TOKEN": "x"}, "ATOLL_URL")],
)
def test_half_an_access_is_misuse(atoll, environment, lacking):
    said = atoll("device", "list", **environment)
    assert said.exit_code == 2
    assert f"${lacking} is not set" in said.stderr


@pytest.mark.parametrize("url", ["hub:8080", "ftp://hub", "http://", "http://hub:port"])
def test_an_address_that_is_none_is_misuse(atoll, url):
    said = atoll("device", "list", ATOLL_URL=url, ATOLL_TOKEN="x")
    assert said.exit_code == 2
    assert "is not the URL of a hub" in said.stderr


@pytest.mark.parametrize("content", ["", "{", "[]", '{"url": "http://x"}'])
def test_a_damaged_operator_file_is_named(atoll, tmp_path, content):
    (tmp_path / "operator.json").write_text(content)
    said = atoll("device", "list", "--data", tmp_path)
    assert said.exit_code == 3
    assert "operator.json cannot be used" in said.stderr
    assert "restart the hub" in said.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["device", "token", "--device", "Not An Id"], "device id 'Not An Id'"),
        (["device", "token", "--label", "role"], "key=value"),
        (["device", "token", "--ttl", "soon"], "--ttl 'soon'"),
        (["device", "token", "--ttl", "-1h"], "--ttl '-1h'"),
        (["device", "show", "../x"], "device id"),
        (["hub", "--superlink", "nowhere"], "host:port"),
        (["hub", "--mqtt-port", "99999"], "--mqtt-port"),
        (["plan", "run", "/no/such/plan.toml"], "cannot read /no/such/plan.toml"),
        (["device"], "Usage"),
    ],
)
def test_wrong_usage_is_told_before_any_network(atoll, arguments, complaint):
    said = atoll(*arguments)
    assert said.exit_code == 2
    assert complaint in said.stderr + said.stdout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name = ", "not TOML"),
        ('name = "x"\ntask = "spar"', "model"),
        ('name = "x"\ntask = "spar"\nmodel = "m"\nrounds = 0', r"rounds"),
        ('name = "x"\ntask = "spar"\nmodel = "m"\n[privacy]\nmode = "magic"', "privacy.mode"),
        ('name = "x"\ntask = "spar"\nmodel = "m"\nepochs = 3', "epochs"),
    ],
)
def test_a_bad_plan_names_the_field_at_fault(atoll, tmp_path, text, complaint):
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    said = atoll("plan", "run", plan)
    assert said.exit_code == 2
    assert str(plan) in said.stderr
    assert complaint in said.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "run", "{}"],
        ["plan", "run", "{}", "--engine", "local", "--devices", "3"],
        ["simulate", "{}", "--devices", "3"],
    ],
    ids=["fleet", "local", "simulate"],
)
def test_a_plan_that_is_not_utf_8_names_the_file_and_the_remedy(atoll, tmp_path, command):
    plan = tmp_path / "plan.toml"
    plan.write_text('name = "x"  # für alle', encoding="latin-1")
    said = atoll(*(word.format(plan) for word in command))
    assert said.exit_code == 2
    assert said.stderr.startswith(f"error: {plan} is not UTF-8 (byte 0xfc at 15)")
    assert "save it as UTF-8" in said.stderr


def test_the_main_program_prints_no_traceback(tmp_path):
    done = subprocess.run(
        [*PROGRAM, "device", "list", "--data", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: there is no ")
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from atoll.server.cli import main; main()' --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_the_data_directory_is_named_by_option_before_environment(atoll, tmp_path):
    other = write_operator_file(tmp_path / "other", "http://no-such-host.invalid")
    said = atoll("login", "--data", Path(other), ATOLL_URL="http://127.0.0.1:1", ATOLL_TOKEN="x")
    assert "no-such-host.invalid" in said.stderr
