"""Fetching a release, a short-lived child: ``python -m atoll.edge_agent.updates …``.

The Update Framework decides what is trusted (python-tuf's ``ngclient``, specification
1.0.34): metadata signed by the keys that ``identity/root.json`` named at enrolment, never
older than what was seen before, not expired. Which signed release may follow which is
:func:`atoll.fleet.trust.may_install`. Only a release whose every file has been verified gets
into a slot. Downloads that break off are taken up where they ended (RFC 9110, §14.2).
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import (  # type: ignore[attr-defined]  # public, without ``__all__``
    Metadata,
    TargetFile,
    Targets,
)
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater
from urllib3.exceptions import HTTPError

from atoll.edge_agent import credentials, slots
from atoll.edge_agent.errors import AgentError, DiskFull, HubError, UpdateRefused
from atoll.edge_agent.events import Release
from atoll.edge_agent.hub import Hub, refusal, translate
from atoll.edge_agent.parent import Parent
from atoll.edge_agent.paths import Paths, make
from atoll.edge_agent.paths import translate as translate_os
from atoll.fleet import bundle, trust
from atoll.fleet.errors import BadBundle

CHUNK: Final = 64 * 1024
SPARE_BYTES: Final = 16 * 1024 * 1024
"""Room that a download leaves on the disk for the outbox and the system."""


class Wish(NamedTuple):
    """What to fetch: ``current`` is the release of the model that served last, if any."""

    release: Release
    current: int | None
    slot: str


class Fetcher(FetcherInterface):
    """TUF's downloads over our mTLS client, resumed from ``partial`` where they broke off."""

    def __init__(self, hub: Hub, partial: Path) -> None:
        self._hub = hub
        self._partial = partial
        self.failure: AgentError | None = None
        """Why the last download failed, in our words."""
        self.resumed = False
        """Whether the last download continued an earlier one."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._stream(url, 0)[1]

    def _stream(self, url: str, start: int) -> tuple[int, Iterator[bytes]]:
        """Return where the answer begins (0 when it is whole) and its bytes."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        try:
            response = self._hub.pool.request("GET", url, headers=headers, preload_content=False)
        except HTTPError as error:
            self.failure = translate(error, self._hub.url)
            raise DownloadError(str(self.failure)) from error
        if response.status == 416 and start:
            response.drain_conn()
            response.release_conn()
            return self._stream(url, 0)
        if response.status >= 400:
            refused = refusal(response.status, response.read(CHUNK))
            response.release_conn()
            # A missing N+1.root.json is how TUF learns that there is no newer root.
            raise DownloadHTTPError(str(refused), refused.status)
        begins = start if response.status == 206 and _begins_at(response, start) else 0
        return begins, self._chunks(response)

    def _chunks(self, response: Any) -> Iterator[bytes]:  # noqa: ANN401  # urllib3's base type is private
        try:
            for chunk in response.stream(CHUNK, decode_content=False):
                self._hub.bytes_down += len(chunk)
                yield chunk
        except HTTPError as error:
            self.failure = translate(error, self._hub.url)
            raise DownloadError(str(self.failure)) from error
        finally:
            response.close()

    @contextlib.contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """Give a file with the content of ``url``; see :class:`FetcherInterface`.

        What was received of a target stays on the disk when the connection fails, and is gone
        once the caller has accepted or refused the whole. Metadata changes under one name, so
        it is always fetched anew.
        """
        path = self._partial / hashlib.sha256(url.encode()).hexdigest()
        with path.open("a+b") as file:
            start = file.seek(0, os.SEEK_END) if "/targets/" in url else 0
            start = start if start < max_length else 0
            try:
                begins, chunks = self._stream(url, start)
                self.resumed = begins > 0
                file.truncate(begins)
                for chunk in _at_most(max_length - begins, chunks):
                    file.write(chunk)
                file.flush()
                file.seek(0)
                yield file
            except DownloadError as error:
                if isinstance(error, DownloadLengthMismatchError) or not file.tell():
                    path.unlink(missing_ok=True)
                raise
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            path.unlink(missing_ok=True)


def _at_most(length: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        length -= len(chunk)
        if length < 0:
            raise DownloadLengthMismatchError("more bytes came than the signed metadata says")
        yield chunk


def _begins_at(response: Any, start: int) -> bool:  # noqa: ANN401  # urllib3's base type is private
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")


def fetch(paths: Paths, wish: Wish, hub: Hub) -> Path:
    """Bring a release into its slot, verified file by file; return the slot.

    Raises :class:`UpdateRefused` or :class:`DiskFull` where trying again would not help, and
    :class:`HubError` where it may.
    """
    model, number = wish.release
    metadata, partial = paths.tuf / "metadata", paths.tuf / "partial"
    staging = paths.tuf / "staging" / f"{model}-{number}"
    for directory in (metadata, partial, staging, paths.models / model):
        make(directory)
    fetcher = Fetcher(hub, partial)
    try:
        updater = Updater(
            str(metadata),
            f"{hub.url}/v1/tuf/metadata/",
            target_base_url=f"{hub.url}/v1/tuf/targets/",
            fetcher=fetcher,
            bootstrap=(paths.identity / "root.json").read_bytes(),
        )
        updater.refresh()
        wanted = _judge(metadata, wish)
        for other in set(staging.parent.iterdir()) - {staging}:
            shutil.rmtree(other)
        before = slots.holding(paths.models, wish.release)
        _check_room(paths, partial, sum(target.length for target in wanted.values()))
        for file, target in wanted.items():
            if before is not None and updater.find_cached_target(target, str(before / file)):
                shutil.copyfile(before / file, staging / file)
            elif not updater.find_cached_target(target, str(staging / file)):
                _download(updater, fetcher, target, staging / file)
        bundle.read(staging)
        slot = paths.models / model / wish.slot
        slots.seal(staging, slot, number)
    except ExpiredMetadataError as error:
        raise HubError(
            f"the hub's signed metadata has expired ({error}): it may be replaying an old state, "
            "or this device's clock is wrong"
        ) from error
    except RepositoryError as error:
        raise UpdateRefused(f"signed metadata or a file failed verification: {error}") from error
    except BadBundle as error:
        raise UpdateRefused(str(error)) from error
    except DownloadError as error:
        raise fetcher.failure or HubError(f"a download failed: {error}") from error
    except OSError as error:
        raise translate_os(error, paths.data) from error
    return slot


def _download(updater: Updater, fetcher: Fetcher, target: TargetFile, path: Path) -> None:
    """Download one file; a continued download that does not verify is begun once more."""
    try:
        updater.download_target(target, str(path))
    except LengthOrHashMismatchError:
        if not fetcher.resumed:
            raise
        updater.download_target(target, str(path))


def _judge(metadata: Path, wish: Wish) -> dict[str, TargetFile]:
    """Return the targets of the wanted release, by file name; raise :class:`BadBundle`."""
    # ``Updater`` has verified and just written this file; it offers no list of targets.
    targets = Metadata[Targets].from_file(str(metadata / "targets.json")).signed.targets
    model, number = wish.release
    top = trust.newest(targets, model)
    if top is None:
        raise BadBundle(f"no release of {model} is signed")
    trust.may_install(wish.current, number, top)
    wanted = {}
    for file in bundle.FILES:
        path = trust.target_path(model, number, file)
        if path not in targets:
            raise BadBundle(f"{model} release {number} is not signed: {file} is missing")
        trust.info_of(path, targets[path])
        wanted[file] = targets[path]
    return wanted


def _check_room(paths: Paths, partial: Path, length: int) -> None:
    # The largest file lies twice on the disk for a moment; count all of them twice.
    needed = 2 * length + SPARE_BYTES - sum(file.stat().st_size for file in partial.iterdir())
    if shutil.disk_usage(paths.data).free < needed:
        raise DiskFull(paths.data, needed)


def main(arguments: list[str] | None = None) -> int:
    """Fetch, and tell the parent how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--release", type=int, required=True)
    parser.add_argument("--slot", choices=slots.NAMES, required=True)
    parser.add_argument("--current", type=int)
    given = parser.parse_args(arguments)
    parent = Parent()
    parent.listen(lambda _: None, lambda: os._exit(1))
    paths = Paths(given.data)
    wish = Wish(Release(given.model, given.release), given.current, given.slot)
    answer: dict[str, Any] = {"model": given.model, "release": given.release}
    hub: Hub | None = None
    try:
        who = credentials.load(paths)
        hub = Hub(who.hub.url, who.context())
        fetch(paths, wish, hub)
        answer |= {"kind": "fetched"}
    except AgentError as error:
        final = not isinstance(error, HubError)
        answer |= {"kind": "fetch-failed", "error": str(error), "final": final}
    if hub is not None:
        answer |= {"bytes_up": hub.bytes_up, "bytes_down": hub.bytes_down}
    parent.tell(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
