"""Requests with large bodies over TLS, as httpx means them."""

import asyncio
import contextlib
import socket
import ssl
import threading
from datetime import UTC, datetime

import httpx
import pytest

from atoll.federation.transport import Transport, distrusts
from atoll.fleet.authority import Authority

LARGE = bytes(range(256)) * 20_000
"""Far more than a TLS record and a socket's buffer."""
HANG = b"hang"


class Server:
    """An HTTPS server that says what it was sent, or what the test wants."""

    def __init__(self, certificate, key):
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(certificate, key)
        self.requests, self.connections = [], 0
        self.reply, self.closes, self.deaf = None, False, False

    async def talk(self, reader, writer):
        self.connections += 1
        ended = (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError)
        with contextlib.suppress(*ended):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, *fields = head.decode("ascii").strip().split("\r\n")
                headers = {
                    name.lower(): value for name, value in (f.split(": ", 1) for f in fields)
                }
                if self.deaf:
                    writer.transport.abort()
                    return
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((line, headers, body))
                if self.reply == HANG:
                    await asyncio.sleep(60)
                echo = b"HTTP/1.1 200 OK\r\nX-One: a\r\nX-One: b\r\nContent-Length: %d\r\n\r\n"
                writer.write(echo % len(body) + body if self.reply is None else self.reply)
                await writer.drain()
                if self.closes:
                    break
        writer.close()


@pytest.fixture
def authority():
    return Authority.create("Test", datetime.now(UTC))


@pytest.fixture
def server(tmp_path, authority):
    key, certificate = authority.issue_server(["localhost"], ["127.0.0.1"], datetime.now(UTC))
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "cert.pem").write_bytes(certificate)
    mine = Server(tmp_path / "cert.pem", tmp_path / "key.pem")
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def listen():
        listening = await asyncio.start_server(mine.talk, "127.0.0.1", 0, ssl=mine.context)
        mine.port = listening.sockets[0].getsockname()[1]
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await listening.serve_forever()

    task = loop.create_task(listen())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,))
    thread.start()
    ready.wait()
    mine.url = f"https://127.0.0.1:{mine.port}/v1/some?thing=1"
    yield mine
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    for left in asyncio.all_tasks(loop):
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(left)
    loop.close()


@pytest.fixture
def client(authority):
    context = ssl.create_default_context(cadata=authority.cert_pem.decode("ascii"))
    with httpx.Client(transport=Transport(context), trust_env=False, timeout=10.0) as mine:
        yield mine


def test_a_large_body_goes_and_comes_as_it_is_over_one_connection(server, client):
    for _ in range(3):
        answer = client.post(server.url, content=LARGE, headers={"x-mine": "yes"})
        assert (answer.status_code, answer.content) == (200, LARGE)
        assert answer.headers.get_list("x-one") == ["a", "b"]
    line, headers, body = server.requests[-1]
    assert line == "POST /v1/some?thing=1 HTTP/1.1"
    assert headers["host"] == f"127.0.0.1:{server.port}"
    assert headers["x-mine"] == "yes"
    assert (int(headers["content-length"]), body) == (len(LARGE), LARGE)
    assert server.connections == 1


def test_what_is_no_success_is_an_answer_and_not_followed(server, client):
    server.reply = b"HTTP/1.1 307 Elsewhere\r\nLocation: /there\r\nContent-Length: 2\r\n\r\nno"
    answer = client.post(server.url, content=b"x")
    assert (answer.status_code, answer.content) == (307, b"no")
    assert len(server.requests) == 1


def test_a_connection_that_the_server_closed_is_not_used_again(server, client):
    server.closes = True
    server.reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    assert [client.post(server.url, content=b"x").content for _ in range(3)] == [b"ok"] * 3
    assert server.connections == 3


def test_an_answer_cut_short_is_an_error_and_not_asked_for_again(server, client):
    server.closes = True
    server.reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nhalf"
    with pytest.raises(httpx.ReadError):
        client.post(server.url, content=b"x")
    assert len(server.requests) == 1


def test_no_answer_at_all_is_an_error(server, client):
    server.reply, server.closes = b"", True
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        client.post(server.url, content=b"x")


def test_an_answer_that_does_not_come_in_time_is_an_error(server, client):
    server.reply = HANG
    with pytest.raises(httpx.ReadTimeout):
        client.post(server.url, content=b"x", timeout=0.2)


def test_a_server_of_another_authority_is_refused_by_tls(server):
    with (
        httpx.Client(transport=Transport(ssl.create_default_context())) as stranger,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE") as refused,
    ):
        stranger.post(server.url, content=b"x")
    assert distrusts(refused.value)
    assert not server.requests


def dropping(listening, heard):
    """Accept and close connections, after ``heard`` bytes of each."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection:
                left = heard
                while left > 0 and (came := connection.recv(left)):
                    left -= len(came)


@pytest.mark.parametrize("heard", [0, 1, 500])
def test_a_connection_that_breaks_is_no_distrust(client, heard):
    """As where a balancer stands before a hub that is down, or the hub ends in the handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=dropping, args=(listening, heard))
        thread.start()
        with pytest.raises(httpx.ReadError) as broke:
            client.post(f"https://127.0.0.1:{listening.getsockname()[1]}/", content=b"x")
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert not distrusts(broke.value)
    # flwr gives a request up where an error speaks of these, and repeats it otherwise.
    assert not any(word in str(broke.value).lower() for word in ("ssl", "tls", "certificate"))


def test_a_server_that_ends_while_it_is_sent_something_is_no_distrust(server, client):
    server.deaf = True
    with pytest.raises(httpx.ReadError) as broke:
        client.post(server.url, content=LARGE * 4)
    assert not distrusts(broke.value)
    assert not any(word in str(broke.value).lower() for word in ("ssl", "tls", "certificate"))


def test_a_length_that_cannot_be_is_an_error(server, client):
    server.closes = True
    server.reply = b"HTTP/1.1 200 OK\r\nContent-Length: 90000000000000\r\n\r\nhalf"
    with pytest.raises(httpx.ReadError):
        client.post(server.url, content=b"x")


def test_a_header_of_any_bytes_is_read(server, client):
    server.reply = b"HTTP/1.1 503 Busy\r\nX-Odd: \xe4\xff\r\nContent-Length: 2\r\n\r\nno"
    answer = client.post(server.url, content=b"x")
    assert (answer.status_code, answer.content) == (503, b"no")


def test_nobody_there_is_an_error_at_once(client):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(httpx.ConnectError, match="refused"):
        client.post(f"https://127.0.0.1:{port}/", content=b"x")


def test_threads_share_it(server, client):
    bodies = [bytes([number]) * 1_000_000 for number in range(8)]
    came = {}

    def ask(number):
        came[number] = client.post(server.url, content=bodies[number]).content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [came[number] for number in range(8)] == bodies
