"""The whole agent as a user runs it, against a real broker and a hub over TLS."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench
import numpy as np
import psutil
import pytest
import urllib3
from bench import wait_until

from atoll.edge_agent.paths import Paths
from atoll.fleet import wire

AGENT = Path(sys.executable).with_name("atoll-agent")


@contextmanager
def running(paths: Paths, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    log = (paths.data.parent / "agent.log").open("ab")
    with log:
        process = subprocess.Popen(
            [sys.executable, AGENT, "run", "--data", paths.data, "--health-seconds", "1", *options],
            stderr=log,
        )
        try:
            yield process
        finally:
            children = psutil.Process(process.pid).children() if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
            _, left = psutil.wait_procs(children, 10)
            assert not left, "children outlived the agent"


def status(paths: Paths) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, AGENT, "status", "--json", "--data", paths.data],
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


def infer(url: str, x: np.ndarray) -> np.ndarray:
    body = {
        "inputs": [
            {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
        ]
    }
    reply = urllib3.request("POST", f"{url}/v2/models/gait/infer", json=body, timeout=20)
    assert reply.status == 200, reply.data
    output = reply.json()["outputs"][0]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def reported(broker: bench.MqttBroker) -> wire.Reported | None:
    found = broker.bodies(wire.Reported)
    return found[-1] if found else None


@pytest.fixture
def paths(tmp_path: Path, hub: bench.TestHub, broker: bench.MqttBroker) -> Paths:
    return bench.enrolled(hub, tmp_path / "device")


def publish(hub: bench.TestHub, tmp_path: Path, release: int, **more: object) -> None:
    directory = tmp_path / f"bundle-{release}"
    bench.write_bundle(directory, seed=release, **more)
    hub.repository.add(directory, "gait", release, fallback=release - 1 or None)


def test_installs_serves_watches_updates_refuses_and_says_goodbye(paths, hub, broker, tmp_path):
    publish(hub, tmp_path, 1)
    broker.desire("watch-1", wire.Desired(version=1, model="gait", release=1))
    with running(paths, "--window-rows", "20") as process:
        wait_until(lambda: broker.bodies(wire.Reported), "a report")
        wait_until(lambda: reported(broker).state == "serving", "serving release 1")
        birth = broker.bodies(wire.Birth)[0]
        assert birth.labels == {"role": "trainer"}
        url = birth.serve_url
        x = bench.examples(20, seed=5)
        np.testing.assert_allclose(infer(url, x), bench.logits(x, 1), rtol=1e-5)
        wait_until(lambda: broker.bodies(wire.Window), "a window of counts")
        window = broker.bodies(wire.Window)[0]
        assert (window.model, window.release, window.rows) == ("gait", 1, 20)

        shown = status(paths)
        assert (shown["release"], shown["state"], shown["connected"]) == (1, "serving", True)
        assert shown["serve_url"] == url

        publish(hub, tmp_path, 2)
        broker.desire("watch-1", wire.Desired(version=2, model="gait", release=2))
        wait_until(lambda: reported(broker).release == 2, "serving release 2")
        np.testing.assert_allclose(infer(url, x), bench.logits(x, 2), rtol=1e-5)

        publish(hub, tmp_path, 3, golden_error=0.5)
        broker.desire("watch-1", wire.Desired(version=3, model="gait", release=3))
        wait_until(lambda: reported(broker).state == "failed", "refusing release 3")
        assert "golden check" in reported(broker).error
        assert reported(broker).release == 2
        np.testing.assert_allclose(infer(url, x), bench.logits(x, 2), rtol=1e-5)

        wait_until(
            lambda: any(one.rss.get("serving") for one in broker.bodies(wire.Health)), "health"
        )
        first = broker.bodies(wire.Health)[0]
        assert first.accelerator is not None
        assert first.examples is None  # nothing trains, so nobody has counted
        infer(url, x[:3])
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    wait_until(lambda: broker.bodies(wire.Death), "the death message")
    assert broker.bodies(wire.Death)[0].boot == birth.boot
    # What was counted when it was stopped is sent on the way out.
    assert sum(one.rows for one in broker.bodies(wire.Window)) == 20 * 3 + 3
    numbers = [(one.boot, one.seq) for heard in broker.envelopes.values() for one in heard]
    assert len(set(numbers)) == len(numbers)
    assert sorted(seq for _, seq in numbers) == list(range(1, len(numbers) + 1))


def test_keeps_serving_and_loses_nothing_while_the_broker_is_away(paths, hub, broker, tmp_path):
    publish(hub, tmp_path, 1)
    broker.desire("watch-1", wire.Desired(version=1, model="gait", release=1))
    with running(paths, "--window-rows", "10"):
        wait_until(lambda: broker.bodies(wire.Reported), "a report")
        wait_until(lambda: reported(broker).state == "serving", "serving release 1")
        url = broker.bodies(wire.Birth)[0].serve_url
        broker.stop()
        x = bench.examples(10)
        for _ in range(30):
            infer(url, x)
        assert not broker.bodies(wire.Window)
        broker.start()
        wait_until(lambda: len(broker.bodies(wire.Window)) >= 30, "all windows", 60)
        wait_until(lambda: len(broker.bodies(wire.Birth)) == 2, "a second birth")
    numbers = [(one.boot, one.seq) for heard in broker.envelopes.values() for one in heard]
    windows = {(one.boot, one.seq) for one in broker.envelopes["telemetry"]}
    assert len(windows) == len(broker.envelopes["telemetry"])
    assert len(broker.bodies(wire.Window)) == 30
    assert len(set(numbers)) == len(numbers)


def test_killed_outright_it_leaves_no_child_and_goes_on_where_it_was(paths, hub, broker, tmp_path):
    publish(hub, tmp_path, 1)
    broker.desire("watch-1", wire.Desired(version=1, model="gait", release=1))
    with running(paths) as process:
        wait_until(lambda: broker.bodies(wire.Reported), "a report")
        wait_until(lambda: reported(broker).state == "serving", "serving release 1")
        children = psutil.Process(process.pid).children()
        assert children
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        _, left = psutil.wait_procs(children, 15)
        assert not left
    wait_until(lambda: broker.bodies(wire.Death), "the last will")
    hub.requests.clear()
    with running(paths):
        wait_until(lambda: len(broker.bodies(wire.Birth)) == 2, "the second birth")
        wait_until(
            lambda: [one.state for one in broker.bodies(wire.Reported)].count("serving") >= 2,
            "serving again",
        )
        assert [one.boot for one in broker.bodies(wire.Birth)] == [1, 2]
        assert not any("/tuf/" in path for _, path, _ in hub.requests), "fetched what it had"


def test_a_second_agent_on_the_same_directory_is_told_so(paths, broker):
    with running(paths):
        wait_until(lambda: broker.bodies(wire.Birth), "the birth")
        second = subprocess.run(
            [sys.executable, AGENT, "run", "--data", paths.data],
            capture_output=True,
            text=True,
            check=False,
        )
        assert second.returncode == 1
        assert "already running" in second.stderr
        assert "Traceback" not in second.stderr
    assert os.path.exists(paths.database)  # noqa: PTH110  # a plain look


def test_serves_what_it_has_when_everything_else_is_away(paths, hub, broker, tmp_path):
    publish(hub, tmp_path, 1)
    broker.desire("watch-1", wire.Desired(version=1, model="gait", release=1))
    with running(paths):
        wait_until(lambda: broker.bodies(wire.Reported), "a report")
        wait_until(lambda: reported(broker).state == "serving", "serving release 1")
    broker.stop()
    hub.close()
    port = bench.free_port()
    with running(paths, "--serve-port", str(port)):
        wait_until(lambda: status(paths)["state"] == "serving", "serving from the disk")
        x = bench.examples(4)
        np.testing.assert_allclose(
            infer(f"http://127.0.0.1:{port}", x), bench.logits(x, 1), rtol=1e-5
        )
        wait_until(lambda: status(paths)["last_error"], "the reason")
        assert not status(paths)["connected"]


def test_a_training_process_that_cannot_work_is_told_once_and_leaves_the_rest_alone(
    paths, hub, broker, tmp_path
):
    publish(hub, tmp_path, 1)
    broker.desire("watch-1", wire.Desired(version=1, model="gait", release=1, train=True))
    with running(paths, "--task", "no-such-task"):
        wait_until(
            lambda: [one for one in broker.bodies(wire.Event) if one.kind == "trainer"],
            "the event",
            60,
        )
        wait_until(lambda: reported(broker).state == "serving", "serving release 1", 60)
    told = [one for one in broker.bodies(wire.Event) if one.kind == "trainer"]
    assert len(told) == 1
    assert "no-such-task" in told[0].detail
