"""Children start, restart, and never outlive the hub: tried with real processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atoll.server.errors import PortTaken
from atoll.server.guard import MARK, end_marked, marked
from atoll.server.supervisor import Address, Child, ChildFailed, Supervisor, is_open, last_lines

FOREVER = "import time; time.sleep(600)"
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(600)
"""
LISTENING = """
import socket, sys, time
listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))
time.sleep(600)
"""


def python(name, code, *arguments, **options):
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    return Child(name, command, **{"grace": 2.0, **options})


def wait_until(condition, what, deadline=10.0):
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def supervisor(tmp_path):
    with Supervisor(tmp_path / "logs") as made:
        yield made


def test_start_returns_once_the_port_answers(supervisor):
    address = Address("127.0.0.1", free_port())
    supervisor.start(python("listener", LISTENING, address.port, ready=address))
    assert is_open(address)
    assert supervisor.running() == {"listener": True}


def test_a_child_that_ends_at_once_is_an_error_with_its_last_words(supervisor):
    for ready in (None, Address("127.0.0.1", free_port())):
        child = python("loser", "print('first'); raise SystemExit('no space left')", ready=ready)
        with pytest.raises(ChildFailed, match="no space left") as failure:
            supervisor.start(child)
        assert "loser.log" in str(failure.value)
        assert supervisor.running() == {}


def test_the_error_quotes_this_start_and_no_earlier_one(supervisor):
    with pytest.raises(ChildFailed, match="old words"):
        supervisor.start(python("loser", "raise SystemExit('old words')"))
    with pytest.raises(ChildFailed) as failure:
        supervisor.start(python("loser", "raise SystemExit('new words')"))
    assert "old words" not in str(failure.value)


def test_a_child_that_does_not_answer_in_time_is_an_error_and_is_ended(supervisor, tmp_path):
    wrote = tmp_path / "pid"
    code = f"import os, pathlib; pathlib.Path({str(wrote)!r}).write_text(str(os.getpid()))\n"
    address = Address("127.0.0.1", free_port())
    with pytest.raises(ChildFailed, match="did not answer"):
        supervisor.start(python("mute", code + FOREVER, ready=address, ready_timeout=1.0))
    assert not alive(int(wrote.read_text()))


def test_a_program_that_is_not_there_is_named(supervisor):
    with pytest.raises(ChildFailed, match="/no/such/program"):
        supervisor.start(Child("ghost", ["/no/such/program"]))


def test_a_port_that_another_program_holds_is_an_error_that_names_the_option(supervisor):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(*taken.getsockname())
        child = python("late", LISTENING, address.port, ready=address, port_option="--mqtt-port")
        with pytest.raises(PortTaken, match=rf"{address.port}.*--mqtt-port"):
            supervisor.start(child)


def test_a_child_that_dies_is_started_again_and_told_of(tmp_path):
    told = threading.Event()
    names = []

    def restarted(name):
        names.append(name)
        told.set()

    with Supervisor(tmp_path / "logs", restarted) as supervisor:
        supervisor.start(python("phoenix", FOREVER))
        before = supervisor.pid("phoenix")
        assert supervisor.signal("phoenix", signal.SIGKILL)
        assert told.wait(10)
        assert names == ["phoenix"]
        assert supervisor.pid("phoenix") not in (None, before)


def test_a_child_that_cannot_come_back_is_tried_again_until_it_can(tmp_path):
    told = threading.Event()
    address = Address("127.0.0.1", free_port())
    with Supervisor(tmp_path / "logs", lambda _name: told.set()) as supervisor:
        block = tmp_path / "block"
        code = f"import pathlib\nif pathlib.Path({str(block)!r}).exists(): raise SystemExit(1)\n"
        supervisor.start(python("patient", code + LISTENING, address.port, ready=address))
        block.touch()
        supervisor.signal("patient", signal.SIGKILL)
        log = tmp_path / "logs" / "patient.log"
        wait_until(lambda: supervisor.pid("patient") is None, "going down")
        block.unlink()
        assert told.wait(10)
        assert is_open(address)
        assert log.exists()


def test_closing_ends_children_that_ignore_sigterm_and_their_children(tmp_path):
    with Supervisor(tmp_path / "logs") as supervisor:
        # The grandchild leaves the group and the session of its parent.
        code = (
            "import subprocess, sys, time\n"
            f"again = [sys.executable, '-c', {STUBBORN!r}]\n"
            "child = subprocess.Popen(again, start_new_session=True)\n"
            "print(child.pid, flush=True)\n"
        )
        supervisor.start(python("parent", code + STUBBORN, grace=0.2))
        log = tmp_path / "logs" / "parent.log"
        wait_until(lambda: log.read_text().count("ready") == 2, "both being up")
        pids = [supervisor.pid("parent"), int(log.read_text().split()[0])]
        assert all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)


def test_children_are_ended_in_reverse_order(tmp_path):
    order = tmp_path / "order"
    code = (
        "import pathlib, signal, sys\n"
        "def end(*_):\n"
        f"    with open({str(order)!r}, 'a') as file: file.write(sys.argv[1] + ' ')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
    )
    with Supervisor(tmp_path / "logs") as supervisor:
        for name in ("first", "second", "third"):
            supervisor.start(python(name, code + FOREVER, name))
    assert order.read_text().split() == ["third", "second", "first"]


def test_a_stopped_child_stays_down_and_its_name_is_free_again(supervisor):
    supervisor.start(python("brief", FOREVER))
    pid = supervisor.pid("brief")
    supervisor.stop("brief")
    supervisor.stop("brief")
    assert not alive(pid)
    assert not supervisor.signal("brief", signal.SIGHUP)
    supervisor.start(python("brief", FOREVER))
    assert supervisor.running() == {"brief": True}


HUB = """
import sys, time
from pathlib import Path
from atoll.server.supervisor import Child, Supervisor

inner = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
with Supervisor(Path(sys.argv[1])) as supervisor:
    for name in ("one", "two"):
        supervisor.start(Child(name, inner))
    print(supervisor.pid("one"), supervisor.pid("two"), flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        pass
"""


def start_hub(tmp_path):
    hub = subprocess.Popen(
        [sys.executable, "-c", HUB, str(tmp_path / "hub-logs")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert hub.stdout is not None
    return hub, [int(pid) for pid in hub.stdout.readline().split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_the_hub_however_it_ends(tmp_path, how):
    hub, pids = start_hub(tmp_path)
    assert len(pids) == 2
    with hub:
        assert all(alive(pid) for pid in pids)
        os.killpg(hub.pid, how)  # as Ctrl-C in a terminal does: the whole group
        hub.wait(10)
    wait_until(lambda: not any(alive(pid) for pid in pids), "ending the children")


def test_killing_a_supervisor_of_supervisors_leaves_nothing(tmp_path):
    outer = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from atoll.server.supervisor import Child, Supervisor\n"
        "with Supervisor(Path(sys.argv[1]) / 'outer') as supervisor:\n"
        f"    supervisor.start(Child('hub', [sys.executable, '-c', {HUB!r}, sys.argv[1]]))\n"
        "    print('up', flush=True)\n"
        "    time.sleep(600)\n"
    )
    log = tmp_path / "outer" / "hub.log"
    process = subprocess.Popen(
        [sys.executable, "-c", outer, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        wait_until(lambda: len(log.read_text().split()) == 2, "the inner children being up")
        pids = [int(pid) for pid in log.read_text().split()]
        process.kill()
        process.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids), "ending the inner children", 15)


def test_only_marked_processes_are_ended():
    code = [sys.executable, "-I", "-S", "-c", FOREVER]
    environment = {**os.environ, MARK: "test-mark-a"}
    with (
        subprocess.Popen(code, env=environment) as ours,
        subprocess.Popen(code, env={**os.environ, MARK: "test-mark-ab"}) as other,
    ):
        wait_until(lambda: marked("test-mark-a") == [ours.pid], "starting")
        end_marked_in_background = threading.Thread(target=end_marked, args=("test-mark-a", 5.0))
        end_marked_in_background.start()
        assert ours.wait(10) == -signal.SIGTERM
        end_marked_in_background.join(10)
        assert other.poll() is None
        other.kill()


def test_last_lines_of_a_log_come_on_one_line(tmp_path):
    log = tmp_path / "x.log"
    assert last_lines(log) == ""
    log.write_text("".join(f"line {number}\n\n" for number in range(100)))
    assert last_lines(log) == "line 95 / line 96 / line 97 / line 98 / line 99"
