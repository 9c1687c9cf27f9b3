"""A real SuperLink, its executor, and a front that asks for client certificates."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from atoll.federation.flower import (
    Program,
    SuperLinkAdmin,
    TlsFiles,
    superexec_command,
    superlink_command,
)
from atoll.fleet.identity import Authority, Identity

T = TypeVar("T")
HERE = Path(__file__).parent


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@contextmanager
def running(program: Program, log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program and end it with all it started."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            program.argv,
            env={**os.environ, **program.env, **more},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Front:
    """Passes TLS connections with a client certificate of ours on to the SuperLink."""

    def __init__(self, target: tuple[str, int], tls: TlsFiles) -> None:
        self._target = target
        self._inner = ssl.create_default_context(cafile=tls.ca)
        self._outer = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
        self._outer.load_cert_chain(tls.certificate, tls.key)
        self._outer.verify_mode = ssl.CERT_REQUIRED
        self.passed = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._do(
            asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=self._outer)
        )
        self.url = f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _do(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hub_reader, hub_writer = await asyncio.open_connection(*self._target, ssl=self._inner)
        self._open |= {writer, hub_writer}
        await asyncio.gather(self._pump(reader, hub_writer), self._pump(hub_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                self.passed += 1
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()
        self._open.clear()

    def cut(self) -> None:
        """Break every connection that is open now."""
        self._do(self._cut())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass
class Hub:
    """What a test needs of the running parts."""

    folder: Path
    authority: Authority
    admin: SuperLinkAdmin
    front: Front

    def identity(self, device: str, authority: Authority | None = None) -> tuple[Path, Identity]:
        """Make a device's identity directory."""
        directory = self.folder / "identities" / device
        directory.mkdir(parents=True)
        mine = Identity.new()
        mine.save(directory)
        issuer = authority or self.authority
        certificate = issuer.issue_device(mine.csr(device), device, datetime.now(UTC))
        (directory / "cert.pem").write_bytes(certificate)
        (directory / "ca.pem").write_bytes(self.authority.cert_pem)
        return directory, mine

    @contextmanager
    def node(self, device: str, identity: Path, data: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run a device's warm node as a process."""
        argv = [sys.executable, str(HERE / "node.py"), self.front.url]
        program = Program([*argv, str(identity), str(data), device], {})
        with running(program, self.folder / f"{device}.log") as process:
            yield process


@contextmanager
def made(folder: Path, choose: Callable[[Program], Program]) -> Iterator[Hub]:
    """Run the hub's Flower parts, with the SuperLink that ``choose`` makes of ours."""
    now = datetime.now(UTC)
    authority = Authority.create("Atoll test", now)
    key, certificate = authority.issue_server(["localhost"], ["127.0.0.1"], now)
    tls = TlsFiles(folder / "ca.pem", folder / "tls.pem", folder / "tls-key.pem")
    tls.ca.write_bytes(authority.cert_pem)
    tls.certificate.write_bytes(certificate)
    tls.key.write_bytes(key)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    home = folder / "flower"
    link = choose(superlink_command("127.0.0.1", port, tls, home))
    executor = superexec_command(address, tls.ca, home, os.getpid())
    admin = SuperLinkAdmin(address, authority.cert_pem)
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "CONTRACT_FOLDER": str(folder), "ATOLL_DATA": str(folder / "data")}
    with running(link, folder / "superlink.log") as process:
        wait_for(lambda: admin.ready() or process.poll() is not None, 60, "the SuperLink")
        assert process.poll() is None, (folder / "superlink.log").read_text()
        front = Front(("127.0.0.1", port), tls)
        with running(executor, folder / "superexec.log", **more):
            yield Hub(folder, authority, admin, front)
        front.close()
        admin.close()
