"""``atoll hub`` as a process: what it leaves behind, and what it says when it cannot start."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-c", "from atoll.server.cli import main; main()", "hub"]
PORTS = ["--device-port", "0", "--mqtt-port", "0", "--operator-port", "0", "--host", "127.0.0.1"]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid):
    """Return the processes below ``pid``, by their parents."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


@pytest.fixture
def hub(tmp_path):
    """A hub in a session of its own, as a terminal would have it."""
    data = tmp_path / "data"
    process = subprocess.Popen(
        [*PROGRAM, "--data", str(data), *PORTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        said = []
        while not said or not said[-1].startswith("Data "):
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"the hub ended: {''.join(said)}")
            said.append(line)
        yield process, data
        if process.poll() is None:
            process.kill()


def test_ctrl_c_ends_the_hub_and_leaves_no_process(hub, wait_until):
    process, data = hub
    below = descendants(process.pid)
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below]
    for program in (b"nats-server", b"superlink", b"superexec"):
        assert any(program in command for command in commands), program
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in process.stdout.read()
    wait_until(lambda: not any(map(alive, below)), "ending the children")
    assert json.loads((data / "operator.json").read_text())["token"]


def test_a_hub_that_is_killed_leaves_no_process_and_starts_again(hub, wait_until):
    process, data = hub
    below = descendants(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, below)), "ending the children")
    again = subprocess.Popen(
        [*PROGRAM, "--data", str(data), *PORTS], stdout=subprocess.PIPE, text=True
    )
    with again:
        assert again.stdout.readline().startswith("Dashboard")
        again.terminate()
        assert again.wait(30) == 0


@pytest.mark.skipif(
    shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") is None,
    reason="mosquitto is not installed (apt install mosquitto)",
)
def test_a_hub_can_have_mosquitto_started(tmp_path):
    command = [*PROGRAM, "--data", str(tmp_path / "data"), *PORTS, "--broker", "mosquitto"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("Dashboard")
        below = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(process.pid)]
        assert any(b"mosquitto" in command for command in below)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def refused(data, *options):
    """Run a hub that cannot start; return what it says on its way out."""
    began = time.monotonic()
    done = subprocess.run(
        [*PROGRAM, "--data", str(data), *PORTS, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.stderr
    assert time.monotonic() - began < 45
    return error[0]


@pytest.mark.parametrize("option", ["--device-port", "--mqtt-port", "--operator-port"])
def test_a_port_in_use_is_told_with_the_option_that_moves_it(tmp_path, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path / "data", option, str(port))
    assert str(port) in said
    assert option in said


def test_a_second_hub_on_the_same_data_is_refused(hub):
    _, data = hub
    assert "another hub is running" in refused(data)


def test_data_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    assert str(tmp_path / "file") in refused(tmp_path / "file" / "data")


def test_a_broker_that_is_none_is_told(tmp_path):
    assert "mqtts://host:port" in refused(tmp_path / "data", "--broker", "emqx")


@pytest.mark.long
def test_a_broker_that_does_not_answer_is_told(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"mqtts://127.0.0.1:{probe.getsockname()[1]}"
        assert url.removeprefix("mqtts://") in refused(tmp_path / "data", "--broker", url)
