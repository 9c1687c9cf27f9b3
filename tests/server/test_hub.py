"""A hub's start and end: whole or not at all, and nothing left behind."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from atoll.server.errors import AlreadyRunning, CannotStart, PortTaken, StoreUnusable
from atoll.server.hub import Hub
from atoll.server.settings import Settings
from atoll.server.tls_files import open_authority, open_tls

Make = Callable[[Path], Settings]


def test_a_second_hub_on_the_same_directory_is_refused(running: Any, hub_settings: Make) -> None:
    with pytest.raises(AlreadyRunning, match="another hub is running"):
        Hub(hub_settings(running.hub.context.settings.data)).start()


@pytest.mark.parametrize("port", ["device_port", "operator_port", "mqtt_port"])
def test_a_port_in_use_is_named_and_nothing_is_left(
    tmp_path: Path, hub_settings: Make, port: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        settings = replace(hub_settings(tmp_path / "data"), **{port: number})
        with pytest.raises(PortTaken, match=str(number)) as caught:
            Hub(settings).start()
    assert f"--{port.replace('_', '-')}" in caught.value.remedy
    assert not settings.operator_file.exists()


def test_a_directory_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, hub_settings: Make
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match=r"cannot use .*file") as caught:
        Hub(hub_settings(tmp_path / "file" / "data")).start()
    assert "--data" in caught.value.remedy


def test_a_damaged_database_is_one_sentence(tmp_path: Path, hub_settings: Make) -> None:
    settings = hub_settings(tmp_path / "data")
    settings.data.mkdir()
    (settings.data / "hub.db").write_bytes(b"x" * 5000)
    with pytest.raises(StoreUnusable, match="not a database"):
        Hub(settings).start()


def test_damaged_certificates_are_one_sentence(tmp_path: Path, hub_settings: Make) -> None:
    settings = hub_settings(tmp_path / "data")
    settings.ca.mkdir(parents=True)
    (settings.ca / "key.pem").write_text("no key")
    with pytest.raises(CannotStart, match="cannot be used"):
        Hub(settings).start()


def test_a_broker_elsewhere_that_does_not_answer_is_one_sentence(
    tmp_path: Path, hub_settings: Make
) -> None:
    settings = replace(hub_settings(tmp_path / "data"), broker="mqtts://127.0.0.1:1")
    with pytest.raises(CannotStart, match="does not let the hub in"):
        Hub(settings, patience=0.2).start()


def test_a_hub_that_starts_again_is_the_same_hub(tmp_path: Path, hub_settings: Make) -> None:
    settings = hub_settings(tmp_path / "data")

    def start_once() -> tuple[str, str, dict[str, bytes]]:
        with Hub(settings) as hub:
            told = json.loads(settings.operator_file.read_text())
            assert stat.S_IMODE(settings.operator_file.stat().st_mode) == 0o600
            headers = {"authorization": f"Bearer {told['token']}"}
            url = f"{told['url']}/api/v1/devices"
            assert httpx.get(url, headers=headers, trust_env=False).status_code == 200
            kept = {
                str(path): path.read_bytes()
                for folder in (settings.ca, settings.tls, settings.offline_keys)
                for path in folder.iterdir()
            }
            return hub.context.authority.fingerprint, told["token"], kept

    first, second = start_once(), start_once()
    assert first == second
    settings.operator_file.unlink()
    third = start_once()
    assert third[0] == first[0]
    assert third[1] != first[1]
    private = [path for path in settings.data.rglob("*key*.pem") if path.is_file()]
    private += list(settings.offline_keys.iterdir()) + list(settings.online_keys.iterdir())
    assert private
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


def test_the_authority_is_made_whole_or_not_at_all(tmp_path: Path, clock: Any) -> None:
    program = (
        "import resource, sys\n"
        "from datetime import UTC, datetime\n"
        "from pathlib import Path\n"
        "from atoll.server.tls_files import open_authority\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # the key fits, the rest not\n"
        "open_authority(Path(sys.argv[1]) / 'ca', datetime.now(UTC))\n"
    )
    full = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "File too large" in full.stderr
    assert list(tmp_path.iterdir()) == []
    made = open_authority(tmp_path / "ca", clock.utc())
    assert open_authority(tmp_path / "ca", clock.utc()).fingerprint == made.fingerprint


def test_server_certificates_follow_the_host_name_and_their_age(tmp_path: Path, clock: Any) -> None:
    authority = open_authority(tmp_path / "ca", clock.utc())

    def issued(host: str) -> bytes:
        tls = open_tls(authority, tmp_path / "ca" / "cert.pem", tmp_path / "tls", host, clock.utc())
        return tls.api.certificate.read_bytes()

    first = issued("hub.example")
    assert issued("hub.example") == first
    other = issued("10.0.0.7")
    assert other != first
    clock.now += 300 * 86_400
    assert issued("10.0.0.7") != other


def start_process(settings: Settings) -> "subprocess.Popen[str]":
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from atoll.server.errors import CannotStart\n"
        "from atoll.server.hub import run_hub\n"
        "from atoll.server.settings import Settings\n"
        "settings = Settings(data=Path(sys.argv[1]), device_bind='127.0.0.1', device_port=0,\n"
        "    operator_port=0, mqtt_bind='127.0.0.1', mqtt_port=0)\n"
        "try:\n"
        "    run_hub(settings, lambda line: print(line, flush=True))\n"
        "except CannotStart as error:\n"
        "    sys.exit(str(error))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(settings.data)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: "subprocess.Popen[str]") -> set[int]:
    """Return what runs under the supervisor of a hub's process."""
    found: set[int] = set()
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                status = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(status[1]) == process.pid and status[0] != "Z":
                found.add(int(directory.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_hub_and_all_it_has_started(
    tmp_path: Path, hub_settings: Make, wait_until: Callable[..., None], number: signal.Signals
) -> None:
    settings = hub_settings(tmp_path / "data")
    process = start_process(settings)
    try:
        wait_until(settings.operator_file.exists, "starting", 60)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Dashboard")
        started = children(process)
        assert len(started) >= 3
        os.kill(process.pid, number)
        process.wait(30)
        wait_until(lambda: not any(alive(pid) for pid in started), "ending")
        if number != signal.SIGKILL:
            assert process.returncode == 0
        _, said = process.communicate(timeout=10)
        assert "Traceback" not in said
    finally:
        process.kill()
        process.communicate()


def test_a_signal_during_the_start_ends_it_too(
    tmp_path: Path, hub_settings: Make, wait_until: Callable[..., None]
) -> None:
    settings = hub_settings(tmp_path / "data")
    process = start_process(settings)
    try:
        wait_until((settings.data / "logs").exists, "beginning to start", 60)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)
        assert process.returncode == 0, said
        assert "Traceback" not in said[1]
        assert not settings.operator_file.exists()
    finally:
        process.kill()
        process.communicate()
