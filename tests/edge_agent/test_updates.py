"""Fetching signed releases over real TLS: what is refused, and what is taken up again."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bench
import pytest
from securesystemslib.signer import CryptoSigner

from atoll.edge_agent import credentials, slots
from atoll.edge_agent.database import Database
from atoll.edge_agent.errors import DiskFull, HubError, HubRefused, HubUnreachable, UpdateRefused
from atoll.edge_agent.events import Release
from atoll.edge_agent.hub import Hub
from atoll.edge_agent.paths import Paths
from atoll.edge_agent.updates import Wish, fetch
from atoll.fleet import bundle


@pytest.fixture
def paths(tmp_path: Path, hub: bench.TestHub) -> Paths:
    return bench.enrolled(hub, tmp_path / "device")


def publish(hub: bench.TestHub, release: int, fallback: int | None = None, **more) -> None:
    directory = hub.directory / f"bundle-{release}"
    bench.write_bundle(directory, seed=release, **more)
    hub.repository.add(directory, "gait", release, fallback)


def get(paths: Paths, release: int, current: int | None = None, slot: str = "a") -> Path:
    who = credentials.load(paths)
    client = Hub(who.hub.url, who.context())
    try:
        return fetch(paths, Wish(Release("gait", release), current, slot), client)
    finally:
        client.pool.clear()


def test_a_signed_release_lands_in_its_slot_whole(paths, hub):
    publish(hub, 1)
    slot = get(paths, 1)
    assert slot == paths.models / "gait" / "a"
    assert bundle.read(slot).model == "gait"
    assert slots.holding(paths.models, Release("gait", 1)) == slot
    assert list((paths.tuf / "partial").iterdir()) == []


def test_a_download_that_breaks_off_goes_on_where_it_stopped(paths, hub):
    publish(hub, 1)
    hub.break_after = 100
    failures = 0
    while True:
        try:
            get(paths, 1)
            break
        except HubUnreachable:
            failures += 1
            assert failures < 60
    assert failures >= 5
    resumed = [wanted for _, path, wanted in hub.requests if "/targets/" in path and wanted]
    assert "bytes=100-" in resumed
    assert "bytes=200-" in resumed
    assert bundle.read(paths.models / "gait" / "a").model == "gait"


def test_a_partial_download_that_a_power_cut_damaged_is_begun_anew(paths, hub):
    publish(hub, 1)
    hub.break_after = 100
    with pytest.raises(HubUnreachable):
        get(paths, 1)
    for part in (paths.tuf / "partial").iterdir():
        part.write_bytes(b"?" * part.stat().st_size)
    hub.break_after = None
    get(paths, 1)
    assert bundle.read(paths.models / "gait" / "a").model == "gait"


def test_a_damaged_slot_costs_only_the_damaged_file(paths, hub):
    publish(hub, 1)
    slot = get(paths, 1)
    (slot / bundle.CARD).write_bytes(b"changed")
    hub.requests.clear()
    get(paths, 1, slot="b")
    fetched = [path for _, path, _ in hub.requests if "/targets/" in path]
    assert len(fetched) == 1
    assert fetched[0].endswith(bundle.CARD)


def test_targets_signed_with_another_key_are_refused(paths, hub):
    publish(hub, 1)
    get(paths, 1)
    hub.repository.targets.version += 1
    hub.repository.publish(CryptoSigner.generate_ed25519())
    with pytest.raises(UpdateRefused, match="verification"):
        get(paths, 1)


def test_a_changed_file_is_refused_and_nothing_is_installed(paths, hub):
    publish(hub, 1)
    stored = next((hub.repository.targets_dir / "gait" / "1").glob("*.model.onnx"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    with pytest.raises(UpdateRefused):
        get(paths, 1)
    assert slots.holding(paths.models, Release("gait", 1)) is None
    assert not (paths.models / "gait" / "a").exists()


def test_older_metadata_is_refused(paths, hub):
    publish(hub, 1)
    kept = hub.directory / "kept"
    shutil.copytree(hub.repository.metadata, kept)
    publish(hub, 2, fallback=1)
    get(paths, 2)
    shutil.rmtree(hub.repository.metadata)
    shutil.copytree(kept, hub.repository.metadata)
    with pytest.raises(UpdateRefused):
        get(paths, 1, current=2)


def test_expired_metadata_is_refused_but_worth_another_try(paths, hub):
    publish(hub, 1)
    hub.repository.timestamp.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    hub.repository.publish()
    with pytest.raises(HubError, match="expired"):
        get(paths, 1)


def test_going_back_takes_a_signature_that_names_the_release(paths, hub):
    publish(hub, 1)
    publish(hub, 2, fallback=1)
    publish(hub, 3, fallback=2)
    with pytest.raises(UpdateRefused, match="fallback"):
        get(paths, 1, current=3)
    get(paths, 2, current=3)


def test_a_release_that_nobody_signed_is_refused(paths, hub):
    publish(hub, 1)
    with pytest.raises(UpdateRefused, match="not signed"):
        get(paths, 7)


def test_stopping_does_not_open_a_way_back(paths):
    database = Database(paths.database)
    staging = paths.data / "staging"
    bench.write_bundle(staging)
    (paths.models / "gait").mkdir(parents=True)
    slots.seal(staging, paths.models / "gait" / "a", 4)
    slots.install(database, paths.models, Release("gait", 4))
    slots.install(database, paths.models, None)
    assert slots.installed(database) is None
    assert slots.last(database, "gait") == 4
    database.close()


def test_a_new_release_goes_into_the_slot_that_does_not_serve(tmp_path):
    models = tmp_path / "models"
    assert slots.spare(models, "gait", None).name == "a"
    assert slots.spare(models, "gait", slots.Installed("gait", 1, "a")).name == "b"
    assert slots.spare(models, "gait", slots.Installed("gait", 1, "b")).name == "a"
    assert slots.spare(models, "gait", slots.Installed("heart", 1, "a")).name == "a"


def test_a_full_disk_is_told_before_anything_is_fetched(paths, hub, monkeypatch):
    publish(hub, 1)
    usage = shutil.disk_usage(paths.data)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="free some space"):
        get(paths, 1)
    assert not any("/targets/" in path for _, path, _ in hub.requests)


def test_a_hub_that_is_away_is_told_in_a_sentence(paths, hub):
    hub.close()
    with pytest.raises(HubUnreachable, match="Connection refused"):
        get(paths, 1)


def test_an_error_of_the_hub_is_told_in_its_own_words(paths, hub):
    who = credentials.load(paths)
    client = Hub(who.hub.url, who.context())
    with pytest.raises(HubRefused, match="there is no such file"):
        client.call("GET", "/v1/tuf/metadata/none.json")
    client.pool.clear()
