"""Fixtures; what they are made of is in ``bench.py`` beside this file."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for bench, which subprocesses do not need

import bench


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[bench.TestHub]:
    with bench.hub_at(tmp_path / "hub") as one:
        yield one


@pytest.fixture
def broker(tmp_path: Path, hub: bench.TestHub) -> Iterator[bench.MqttBroker]:
    if bench.mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    directory = tmp_path / "broker"
    directory.mkdir()
    hub.broker_port = bench.free_port()
    one = bench.MqttBroker(directory, hub, hub.broker_port)
    one.start()
    try:
        yield one
    finally:
        one.stop()
