"""The serving process over real HTTP, as the control process runs it."""

import json
import queue
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import bench
import numpy as np
import pytest
import urllib3

from atoll.edge_agent.children import Ended, Process, Said
from atoll.edge_agent.control import listen_on
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import BadModel
from atoll.edge_agent.events import Release
from atoll.edge_agent.loading import prepare
from atoll.edge_agent.outbox import Outbox
from atoll.edge_agent.watching import softmax
from atoll.fleet import bundle, profile, wire
from atoll.fleet.counts import unpack_all_signed
from atoll.fleet.errors import BadBundle, BadProfile


class Server:
    """A serving process and what it tells."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.bound = listen_on(0)
        self.told: queue.SimpleQueue[Said | Ended] = queue.SimpleQueue()
        arguments = ["--data", str(data), "--fd", str(self.bound.fileno()), "--window-rows", "50"]
        self.process = Process(
            "serving",
            "atoll.edge_agent.serving",
            arguments,
            self.told.put,
            [self.bound.fileno()],
        )
        self.url = f"http://127.0.0.1:{self.bound.getsockname()[1]}"
        self.http = urllib3.PoolManager(retries=False, timeout=20)
        self.hears("up")

    def hears(self, kind: str) -> dict[str, object]:
        while True:
            message = self.told.get(timeout=30)
            assert isinstance(message, Said), message
            if message.message["kind"] == kind:
                return message.message

    def load(self, directory: Path, release: int, answer: str = "accepted") -> dict[str, object]:
        self.process.say(
            {"kind": "load", "model": "gait", "release": release, "directory": str(directory)}
        )
        return self.hears(answer)

    def get(self, path: str) -> tuple[int, object]:
        reply = self.http.request("GET", self.url + path)
        return reply.status, reply.json()

    def post(self, body: object, path: str = "/v2/models/gait/infer") -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = self.http.request("POST", self.url + path, body=data)
        return reply.status, reply.json()

    def close(self) -> None:
        self.http.clear()
        self.process.stop()
        self.process.wait()
        self.bound.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("device")
    database = Database(data / "agent.db")
    Outbox(database).start_boot()
    database.close()
    bench.write_bundle(data / "one", seed=1)
    bench.write_bundle(data / "two", seed=2)
    one = Server(data)
    try:
        assert one.get("/v2/health/live") == (200, {"live": True})
        assert one.get("/v2/health/ready") == (503, {"ready": False})
        assert one.get("/v2/models/gait")[0] == 503
        one.load(data / "one", 1)
        yield one
    finally:
        one.close()


def request(x: np.ndarray, **changes: object) -> dict[str, object]:
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.tolist()}
    return {"inputs": [{**tensor, **changes}]}


X = bench.examples(3)


def test_tells_what_it_is(server):
    assert server.get("/v2")[1]["extensions"] == ["binary_tensor_data"]
    assert server.get("/v2/health/ready") == (200, {"ready": True})
    assert server.get("/v2/models/gait/versions/1/ready") == (200, {"name": "gait", "ready": True})
    assert server.get("/v2/models/gait")[1] == {
        "name": "gait",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 4]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
    }


@pytest.mark.parametrize("flat", [True, False])
def test_infers_from_json_nested_or_flat(server, flat):
    data = X.ravel().tolist() if flat else X.tolist()
    status, reply = server.post({**request(X, data=data), "id": "q7"})
    assert status == 200
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("q7", "gait", "1")
    output = reply["outputs"][0]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [3, 3])
    np.testing.assert_allclose(
        np.reshape(output["data"], output["shape"]), bench.logits(X, 1), rtol=1e-5
    )


def test_infers_from_raw_bytes_and_answers_in_raw_bytes(server):
    tensor = {
        "name": "x",
        "shape": [3, 2, 4],
        "datatype": "FP32",
        "parameters": {"binary_data_size": X.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    reply = server.http.request(
        "POST",
        f"{server.url}/v2/models/gait/infer",
        body=head + X.astype("<f4").tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert reply.status == 200
    length = int(reply.headers["Inference-Header-Content-Length"])
    assert json.loads(reply.data[:length])["outputs"][0]["parameters"] == {"binary_data_size": 36}
    got = np.frombuffer(reply.data[length:], "<f4").reshape(3, 3)
    np.testing.assert_allclose(got, bench.logits(X, 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ({"inputs": []}, "'x'"),
        (request(X, name="y"), "'x'"),
        ({"inputs": request(X)["inputs"] * 2}, "each once"),
        (request(X, datatype="FP64"), "FP32"),
        (request(X, shape=[3, 8]), "[-1, 2, 4]"),
        (request(X, shape=[2, 2, 4]), "does not fill"),
        (request(X, shape=[-3, 2, 4]), "shape"),
        (request(X, shape=[0, 2, 4], data=[]), "shape"),
        (request(X, shape=["3", 2, 4]), "cannot be read"),
        (request(X, data=None), "no data"),
        (request(X, data="AAAA"), "no data"),
        (request(X, data=[[1.0], [2.0, 3.0]]), "ragged"),
        (request(X, data=["a"] * 24), "not all of FP32"),
        (request(X, data=[None] * 24), "not all of FP32"),
        (request(X, data=[1e39] * 24), "NaN or infinity"),
        (request(X, data=[True] * 24), "not all of FP32"),
        ({**request(X), "outputs": [{"name": "nope"}]}, "nope"),
        (request(X, parameters={"binary_data_size": 7}), "binary_data_size"),
        (json.dumps(request(X)).replace("0.", "NaN, 0.", 1).encode(), "cannot be read"),
    ],
)
def test_a_bad_request_is_refused_in_a_sentence(server, body, says):
    status, reply = server.post(body)
    assert status == 400
    assert says in reply["error"]


def test_nan_in_raw_bytes_is_refused(server):
    tensor = {
        "name": "x",
        "shape": [1, 2, 4],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 32},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    reply = server.http.request(
        "POST",
        f"{server.url}/v2/models/gait/infer",
        body=head + struct.pack("<8f", *([float("nan")] * 8)),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert reply.status == 400
    assert "NaN" in reply.json()["error"]


def test_unknown_models_paths_and_methods_are_refused(server):
    assert server.get("/v2/models/other")[0] == 404
    assert server.post(request(X), "/v2/models/gait/versions/9/infer")[0] == 404
    assert server.get("/nothing")[0] == 404
    assert server.get("/v2/models/gait/infer")[0] == 405
    assert server.post(b"[" + b"0," * 9_000_000)[0] == 413


def test_a_swap_drops_no_request_and_a_refused_release_changes_nothing(server):
    stop = threading.Event()
    wrong: list[object] = []
    seen: set[str] = set()

    def hammer() -> None:
        http = urllib3.PoolManager(retries=False, timeout=20)
        while not stop.is_set():
            reply = http.request("POST", f"{server.url}/v2/models/gait/infer", json=request(X))
            body = reply.json()
            if reply.status != 200:
                wrong.append(body)
                return
            seen.add(body["model_version"])
            got = np.reshape(body["outputs"][0]["data"], (3, 3))
            if not np.allclose(got, bench.logits(X, int(body["model_version"])), rtol=1e-4):
                wrong.append(body)
        http.clear()

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        bench.wait_until(lambda: "1" in seen, "answers of release 1")
        for _ in range(4):
            server.load(server.data / "two", 2)
            server.load(server.data / "one", 1)
        server.load(server.data / "two", 2)
        bench.wait_until(lambda: "2" in seen, "answers of release 2")
        bench.write_bundle(server.data / "three", seed=3, golden_error=0.1)
        refused = server.load(server.data / "three", 3, "rejected")
        assert "golden check" in refused["error"]
        assert server.get("/v2/models/gait")[1]["versions"] == ["2"]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        server.load(server.data / "one", 1)
    assert not wrong


def test_every_served_row_is_counted_once_and_no_input_is_kept(tmp_path):
    database = Database(tmp_path / "agent.db")
    box = Outbox(database)
    box.start_boot()
    manifest = bench.write_bundle(tmp_path / "one", seed=1)
    server = Server(tmp_path)
    try:
        server.load(tmp_path / "one", 1)
        x = bench.examples(120, seed=3)
        for start in range(0, 120, 8):
            assert server.post(request(x[start : start + 8]))[0] == 200
    finally:
        server.close()
    windows = [wire.decode(item.payload, wire.Envelope).body for item in box.waiting(99)]
    assert [window.rows for window in windows] == [56, 56, 8]
    bins = profile.Profile.decode((tmp_path / "one" / bundle.PROFILE).read_bytes())
    total = profile.unpack_all(windows[0].counts, bins.bins)
    for window in windows[1:]:
        total = profile.merge(total, profile.unpack_all(window.counts, bins.bins))
    found = profile.features(bins.features, x)
    raw = bench.logits(x, 1).astype(np.float64)
    exp = np.exp(raw - raw.max(axis=1, keepdims=True))
    expected = profile.count(bins, found, exp / exp.sum(axis=1, keepdims=True))
    for name, counts in expected.items():
        np.testing.assert_array_equal(total[name], counts)
    stored = (tmp_path / "agent.db").read_bytes() + (tmp_path / "agent.db-wal").read_bytes()
    assert all(row.tobytes() not in stored for row in x)
    database.close()
    assert manifest.classes == bench.CLASSES


def test_a_release_that_asks_for_noise_has_its_counts_noised_before_they_are_stored(tmp_path):
    database = Database(tmp_path / "agent.db")
    box = Outbox(database)
    box.start_boot()
    bench.write_bundle(tmp_path / "one", seed=1, telemetry_noise=2.0)
    server = Server(tmp_path)
    try:
        server.load(tmp_path / "one", 1)
        x = bench.examples(60, seed=3)
        assert server.post(request(x))[0] == 200
    finally:
        server.close()
    [window] = [wire.decode(item.payload, wire.Envelope).body for item in box.waiting(9)]
    database.close()
    bins = profile.Profile.decode((tmp_path / "one" / bundle.PROFILE).read_bytes())
    assert window.rows == 60
    assert window.noise == pytest.approx(2 * np.sqrt(2 * len(bins.variables)), rel=0.01)
    found = unpack_all_signed(window.counts, bins.bins)
    exact = profile.count(
        bins, profile.features(bins.features, x), softmax(bench.logits(x, 1).astype(np.float64))
    )
    off = np.concatenate([found[name] - exact[name] for name in exact])
    assert off.any()
    assert np.abs(off).max() <= 10 * window.noise


def test_the_process_ends_when_its_parent_is_gone(tmp_path):
    database = Database(tmp_path / "agent.db")
    Outbox(database).start_boot()
    database.close()
    server = Server(tmp_path)
    server.process._process.stdin.close()
    while not isinstance(message := server.told.get(timeout=20), Ended):
        pass
    assert message.how == "ended"
    server.close()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (bundle.MODEL, b"not a model"),
        (bundle.PROFILE, b"\x00"),
        (bundle.GOLDEN, b"PK"),
        (bundle.MANIFEST, b"{}"),
    ],
)
def test_a_damaged_bundle_is_refused_whichever_file_it_is(tmp_path, file, content):
    bench.write_bundle(tmp_path, seed=1)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadBundle):
        prepare(Release("gait", 1), tmp_path)


@pytest.mark.parametrize(
    ("file", "error"),
    [(bundle.MODEL, BadModel), (bundle.PROFILE, BadProfile), (bundle.GOLDEN, BadBundle)],
)
def test_signed_nonsense_is_refused_as_well(tmp_path, file, error):
    manifest = bench.write_bundle(tmp_path / "good", seed=1)
    contents = {
        name: (tmp_path / "good" / name).read_bytes()
        for name in bundle.FILES
        if name != bundle.MANIFEST
    }
    bundle.write(tmp_path / "bad", manifest, {**contents, file: b"nonsense"})
    with pytest.raises(error):
        prepare(Release("gait", 1), tmp_path / "bad")


def test_a_bundle_of_another_model_is_refused(tmp_path):
    bench.write_bundle(tmp_path, seed=1)
    with pytest.raises(BadBundle, match="gait"):
        prepare(Release("heart", 1), tmp_path)


def test_a_port_in_use_is_told_with_the_remedy():
    from atoll.edge_agent.errors import PortInUse

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"{port}.*--serve-port"):
            listen_on(port)
