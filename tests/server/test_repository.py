"""The signed repository, read back by a real ``tuf.ngclient.Updater`` over HTTP."""

import functools
import http.server
import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Targets
from tuf.ngclient import Updater

from atoll.fleet import bundle as bundles
from atoll.fleet import trust
from atoll.server import repository, signing, tuf_metadata
from atoll.server.errors import BadInput, Conflict, HubError, Unavailable
from atoll.server.tuf_metadata import BadRelease

NOW = datetime.now(UTC).replace(microsecond=0)


class Bench:
    """A repository, its keys, and an HTTP server in front of it."""

    def __init__(self, root):
        self.root = root
        self.tuf, self.offline, self.online = root / "tuf", root / "offline", root / "online"
        self.url = ""
        assert repository.ensure(self.tuf, self.offline, self.online, NOW)

    def bundle(self, text="one", model="gait"):
        directory = self.root / f"bundle-{model}-{text}"
        manifest = bundles.Manifest(
            model=model,
            task="spar",
            run="r1",
            created=0.0,
            input=bundles.Input("input", (6, 200)),
            output=bundles.Output("logits"),
            classes=("a", "b"),
            channels=("x",),
        )
        files = {name: f"{name} {text}".encode() for name in bundles.FILES[1:]}
        bundles.write(directory, manifest, files)
        return directory

    def sign(self, bundle, *, model="gait", now=NOW, **numbers):
        current = repository.current_targets(self.tuf)
        release, fallback = signing.next_release(current, model)
        chosen = {"release": release, "fallback": fallback} | numbers
        return signing.sign_release(current, bundle, self.offline, model=model, now=now, **chosen)

    def accept(self, signed, bundle, now=NOW):
        return repository.accept_release(self.tuf, self.online, signed, bundle, now)

    def publish(self, text, model="gait", **numbers):
        bundle = self.bundle(text, model)
        return self.accept(self.sign(bundle, model=model, **numbers), bundle)

    def updater(self, device="device"):
        cache = self.root / device
        cache.mkdir(exist_ok=True)
        updater = Updater(
            str(cache),
            f"{self.url}/metadata/",
            target_base_url=f"{self.url}/targets/",
            bootstrap=(self.tuf / "metadata" / "1.root.json").read_bytes(),
        )
        updater.refresh()
        return updater

    def fetch(self, path, device="device"):
        updater = self.updater(device)
        info = updater.get_targetinfo(path)
        assert info is not None, path
        return updater.download_target(info, str(self.root / "fetched"))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    handler = functools.partial(_Quiet, directory=str(bench.tuf))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        bench.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield bench
        server.shutdown()
        thread.join()


def test_a_device_installs_every_file_of_what_was_signed(bench):
    release = bench.publish("one")
    assert (release.model, release.release, release.fallback) == ("gait", 1, None)
    for name in bundles.FILES:
        path = bench.fetch(trust.target_path("gait", 1, name))
        assert Path(path).read_bytes() == (bench.bundle("one") / name).read_bytes()


def test_releases_follow_each_other_and_name_their_fallback(bench):
    bench.publish("one")
    release = bench.publish("two")
    assert (release.release, release.fallback) == (2, 1)
    bench.updater()
    targets = Metadata[Targets].from_file(str(bench.root / "device" / "targets.json"))
    assert trust.newest(targets.signed.targets, "gait") == (2, 1)
    assert bench.fetch("gait/1/card.md")


def test_models_are_numbered_apart(bench):
    bench.publish("one")
    assert bench.publish("one", model="heart").release == 1


def test_private_keys_are_for_their_owner_alone(bench):
    for directory in (bench.offline, bench.online):
        assert directory.stat().st_mode & 0o777 == 0o700
        for path in directory.iterdir():
            assert path.stat().st_mode & 0o777 == 0o600


def test_the_hub_cannot_sign_without_the_offline_key(bench, tmp_path):
    bundle = bench.bundle()
    foreign = tmp_path / "foreign"
    tuf_metadata.create_keys(foreign, tmp_path / "foreign-online")
    metadata = Metadata[Targets].from_bytes(bench.sign(bundle))
    metadata.signatures.clear()
    metadata.sign(tuf_metadata.signer(foreign, "targets"))
    with pytest.raises(BadRelease, match="not signed with this hub's targets key"):
        bench.accept(metadata.to_bytes(), bundle)
    metadata.sign(tuf_metadata.signer(bench.online, "snapshot"))
    with pytest.raises(BadRelease):
        bench.accept(metadata.to_bytes(), bundle)


def test_a_device_refuses_targets_that_the_hub_made_up(bench):
    bench.publish("one")
    bench.updater()
    signed = bench.sign(bench.bundle("evil"))
    metadata = Metadata[Targets].from_bytes(signed)
    metadata.signatures.clear()
    metadata.sign(tuf_metadata.signer(bench.online, "snapshot"))
    (bench.tuf / "metadata" / "3.targets.json").write_bytes(metadata.to_bytes())
    repository._sign_online(bench.tuf, bench.online, 3, NOW)  # the hub's own keys do sign
    with pytest.raises(RepositoryError):
        bench.updater()


def test_a_device_refuses_older_metadata(bench):
    bench.publish("one")
    before = bench.root / "before"
    shutil.copytree(bench.tuf / "metadata", before)
    bench.publish("two")
    bench.updater()
    shutil.rmtree(bench.tuf / "metadata")
    shutil.copytree(before, bench.tuf / "metadata")
    with pytest.raises(RepositoryError):
        bench.updater()


def test_a_device_refuses_an_older_snapshot_under_a_newer_timestamp(bench):
    bench.publish("one")
    old = bench.tuf / "metadata" / "2.snapshot.json"
    bench.publish("two")
    bench.updater()
    shutil.copy(old, bench.tuf / "metadata" / "3.snapshot.json")
    repository.refresh(bench.tuf, bench.online, NOW)
    newer = Metadata.from_file(str(bench.tuf / "metadata" / "timestamp.json"))
    newer.signed.version += 1
    newer.sign(tuf_metadata.signer(bench.online, "timestamp"))
    newer.to_file(str(bench.tuf / "metadata" / "timestamp.json"))
    with pytest.raises(RepositoryError):
        bench.updater("fresh")


def test_a_device_refuses_files_of_another_release(bench):
    bench.publish("one")
    bench.publish("two")
    targets = bench.tuf / "targets" / "gait"
    first, second = (next((targets / n).glob("*.card.md")) for n in ("1", "2"))
    shutil.copy(first, second)
    with pytest.raises(RepositoryError):
        bench.fetch("gait/2/card.md")


def test_a_device_notices_that_it_is_kept_from_news(bench, monkeypatch):
    old = NOW - tuf_metadata.LIFE["timestamp"] - timedelta(hours=1)
    shutil.rmtree(bench.tuf)
    repository.init_repository(bench.tuf, bench.offline, bench.online, old)
    with pytest.raises(ExpiredMetadataError):
        bench.updater()
    assert repository.refresh(bench.tuf, bench.online, NOW)
    bench.updater("again")


def test_refreshing_waits_until_half_the_life_is_over(bench):
    half = tuf_metadata.LIFE["timestamp"] / 2
    assert not repository.refresh(bench.tuf, bench.online, NOW + half - timedelta(minutes=1))
    assert repository.refresh(bench.tuf, bench.online, NOW + half + timedelta(minutes=1))
    assert not repository.refresh(bench.tuf, bench.online, NOW + half + timedelta(minutes=2))


def test_taking_the_same_again_changes_nothing(bench):
    bundle = bench.bundle()
    signed = bench.sign(bundle)
    release = bench.accept(signed, bundle)
    timestamp = (bench.tuf / "metadata" / "timestamp.json").read_bytes()
    assert bench.accept(signed, bundle) == release
    assert (bench.tuf / "metadata" / "timestamp.json").read_bytes() == timestamp


def test_of_two_people_who_sign_at_once_the_second_signs_again(bench):
    one, two = bench.bundle("one"), bench.bundle("two")
    first, second = bench.sign(one), bench.sign(two)
    bench.accept(first, one)
    with pytest.raises(Conflict, match="sign again"):
        bench.accept(second, two)
    bench.accept(bench.sign(two), two)


def test_the_bundle_must_be_the_one_that_was_signed(bench):
    signed = bench.sign(bench.bundle("one"))
    with pytest.raises(BadRelease, match="not the file that was signed"):
        bench.accept(signed, bench.bundle("two"))
    with pytest.raises(Unavailable):
        repository.current_targets(bench.root / "elsewhere")
    assert bench.updater().get_targetinfo("gait/1/card.md") is None


def test_a_damaged_bundle_is_neither_signed_nor_taken(bench):
    bundle = bench.bundle()
    signed = bench.sign(bundle)
    (bundle / "model.onnx").write_bytes(b"x")
    with pytest.raises(BadRelease):
        bench.sign(bundle)
    with pytest.raises(BadRelease):
        bench.accept(signed, bundle)


@pytest.mark.parametrize(
    "numbers", [{"release": 1}, {"release": 2, "fallback": 7}], ids=["taken", "no such fallback"]
)
def test_numbers_follow_from_what_was_signed(bench, numbers):
    bench.publish("one")
    with pytest.raises(BadRelease):
        bench.sign(bench.bundle("two"), **numbers)


def test_the_signer_does_not_trust_the_hub(bench, tmp_path):
    metadata = Metadata[Targets].from_bytes(repository.current_targets(bench.tuf))
    metadata.signatures.clear()
    metadata.sign(tuf_metadata.signer(bench.online, "snapshot"))
    with pytest.raises(BadRelease, match="your key's signature"):
        signing.sign_release(
            metadata.to_bytes(),
            bench.bundle(),
            bench.offline,
            model="gait",
            release=1,
            fallback=None,
            now=NOW,
        )


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff", b'{"signed": {"_type": "root"}}'])
def test_garbage_is_refused_in_one_sentence(bench, garbage):
    with pytest.raises(BadRelease):
        bench.accept(garbage, bench.bundle())
    with pytest.raises(BadRelease):
        signing.next_release(garbage, "gait")


def test_published_targets_cannot_be_changed_or_dropped(bench):
    bench.publish("one")
    metadata = Metadata[Targets].from_bytes(bench.sign(bench.bundle("two")))
    for path in list(metadata.signed.targets):
        if path.startswith("gait/1/"):
            del metadata.signed.targets[path]
    metadata.signatures.clear()
    metadata.sign(tuf_metadata.signer(bench.offline, "targets"))
    with pytest.raises(BadRelease, match="change or drop"):
        bench.accept(metadata.to_bytes(), bench.bundle("two"))


def test_an_interrupted_publication_can_be_done_again(bench):
    bundle = bench.bundle()
    signed = bench.sign(bundle)
    # As if the power had gone after the files and before the timestamp.
    timestamp = (bench.tuf / "metadata" / "timestamp.json").read_bytes()
    bench.accept(signed, bundle)
    (bench.tuf / "metadata" / "timestamp.json").write_bytes(timestamp)
    assert bench.updater("early").get_targetinfo("gait/1/card.md") is None
    bench.accept(signed, bundle)
    assert bench.fetch("gait/1/card.md", "late")


def test_starting_again_changes_nothing(bench):
    before = (bench.tuf / "metadata" / "1.root.json").read_bytes()
    shutil.rmtree(bench.offline)
    assert not repository.ensure(bench.tuf, bench.offline, bench.online, NOW)
    assert (bench.tuf / "metadata" / "1.root.json").read_bytes() == before


def test_keys_are_never_replaced(bench):
    before = {path: path.read_bytes() for path in bench.offline.iterdir()}
    (bench.online / "timestamp.pem").unlink()
    made = tuf_metadata.create_keys(bench.offline, bench.online)
    assert made == [bench.online / "timestamp.pem"]
    assert {path: path.read_bytes() for path in bench.offline.iterdir()} == before


def test_a_missing_key_names_the_file(bench):
    shutil.rmtree(bench.offline)
    with pytest.raises(BadInput, match="targets key"):
        bench.sign(bench.bundle())


def test_a_damaged_repository_says_so(bench):
    (bench.tuf / "metadata" / "timestamp.json").write_bytes(b"{}")
    with pytest.raises(HubError, match="damaged"):
        repository.current_targets(bench.tuf)
    with pytest.raises((RepositoryError, DownloadError)):
        bench.updater()
