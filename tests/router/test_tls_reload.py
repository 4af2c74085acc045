"""Certificates and authorities that are replaced while a router runs."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import trustme

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, healthy, until
from tests.router.operators import ADMIN, Operator, from_file
from tests.router.test_router_process import process
from tests.router.test_tls import Certificates, certificates, serial, trusting

__all__ = ["certificates"]  # a fixture

pytestmark = pytest.mark.anyio


class Person:
    """A client with a certificate of an authority of its own."""

    def __init__(self, server: Certificates) -> None:
        self.authority = trustme.CA()
        self._issued = self.authority.issue_cert("somebody@example.org")
        self._server = server

    def context(self) -> ssl.SSLContext:
        context = self._server.client()
        self._issued.configure_cert(context)
        return context

    async def is_let_in(self, url: str) -> bool:
        """Whether it is answered on a new connection."""
        async with trusting(self.context()) as session:
            try:
                async with session.get(url + "/v1/models") as response:
                    return response.status == 200
            except (aiohttp.ClientError, ssl.SSLError, ConnectionError):
                return False


def text(engine: FakeEngine, more: str = "", tls: str = "client_ca_file: clients.pem") -> str:
    return (
        f"port: 0\nshutdown_grace_s: 0.5\nadmin: {{port: 0, key_hash: '{ADMIN['key_hash']}'}}\n"
        f"tls: {{cert_file: cert.pem, key_file: key.pem, {tls}}}\n"
        f"instances: [{{id: a, url: '{engine.url}'}}]\n{more}"
    )


def write(path: Path, content: str) -> None:
    path.write_text(content, "utf-8")


Started = tuple[str, Callable[[], Awaitable[None]]]


@asynccontextmanager
async def in_this_process(path: Path, engine: FakeEngine) -> AsyncIterator[Started]:
    """A router on asyncio's loop; yields its url and what has it read its file again."""
    async with from_file(path, text(engine)) as (client, _):

        async def reload() -> None:
            await client.router.reload()

        yield client.router.url, reload


@asynccontextmanager
async def in_its_own(path: Path, engine: FakeEngine) -> AsyncIterator[Started]:
    """The same as a process of its own, which runs on uvloop."""
    write(path, text(engine))
    async with process("--config", str(path), log=True) as (running, url):

        async def reload() -> None:
            running.send_signal(signal.SIGHUP)
            assert running.stderr is not None
            while b"configuration read again" not in await running.stderr.readline():
                pass

        yield url, reload


@pytest.mark.parametrize("started", [in_this_process, in_its_own])
async def test_clients_of_an_authority_that_was_replaced_are_let_in_no_more(
    certificates: Certificates, started: Callable[..., AbstractAsyncContextManager[Started]]
) -> None:
    old, new = Person(certificates), Person(certificates)
    file = certificates.folder / "clients.pem"
    old.authority.cert_pem.write_to_path(str(file))
    async with FakeEngine(held=True).serving() as engine, asyncio.timeout(60):
        async with started(certificates.folder / "router.yaml", engine) as (url, reload):
            assert await old.is_let_in(url)
            assert not await new.is_let_in(url)
            async with trusting(old.context()) as session:
                call = asyncio.ensure_future(session.post(url + CHAT, json={}).__aenter__())
                await engine.wait_for(received=1)

                new.authority.cert_pem.write_to_path(str(file))
                await reload()
                assert not await old.is_let_in(url)
                assert await new.is_let_in(url)

                engine.release()  # a call under way ends well, and its connection with it
                async with await call as response:
                    assert response.status == 200
                    assert response.headers["Connection"] == "close"
                with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                    async with session.get(url + "/health"):
                        pass
            async with trusting(new.context()) as session:
                for _ in range(2):  # while others are kept
                    async with session.get(url + "/health") as response:
                        assert "Connection" not in response.headers


async def test_a_session_from_before_does_not_let_anybody_in(certificates: Certificates) -> None:
    old, new = Person(certificates), Person(certificates)
    file = certificates.folder / "clients.pem"
    old.authority.cert_pem.write_to_path(str(file))
    context = old.context()

    def ask(url: str, session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool]:
        """Ask for /health; returns what the next connection can go on from, and whether this
        one went on from the last."""
        host, _, port = url.partition("://")[2].partition(":")
        with (
            socket.create_connection((host, int(port)), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname=host, session=session) as wrapped,
        ):
            wrapped.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = b""
            while piece := wrapped.recv(65536):
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200")
            return wrapped.session, wrapped.session_reused is True

    async with FakeEngine().serving() as engine:
        path = certificates.folder / "router.yaml"
        async with from_file(path, text(engine)) as (client, _):
            url = client.router.url
            session, _ = await asyncio.to_thread(ask, url, None)
            session, resumed = await asyncio.to_thread(ask, url, session)
            assert resumed
            new.authority.cert_pem.write_to_path(str(file))
            await client.router.reload()
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                await asyncio.to_thread(ask, url, session)


async def test_whoever_needed_no_certificate_needs_one_once_the_file_says_so(
    certificates: Certificates,
) -> None:
    person = Person(certificates)
    person.authority.cert_pem.write_to_path(str(certificates.folder / "clients.pem"))
    path = certificates.folder / "router.yaml"
    async with FakeEngine().serving() as engine:
        async with from_file(path, text(engine, tls="")) as (client, write):
            url, admin_url = client.router.url, client.router.admin_url
            async with trusting(certificates.client()) as session:
                async with session.get(url + "/health") as response:
                    assert response.status == 200
            write(text(engine))
            assert await client.router.reload() == ["tls"]
            for each in (url, admin_url):
                async with trusting(certificates.client()) as session:
                    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
                        async with session.get(each + "/health"):
                            pass
            assert await person.is_let_in(url)


async def test_a_connection_outlives_the_certificate_that_it_was_made_with(
    certificates: Certificates,
) -> None:
    path = certificates.folder / "router.yaml"
    async with FakeEngine().serving() as engine:
        async with from_file(path, text(engine, tls="")) as (client, _):
            async with trusting(certificates.client()) as session:
                for _ in range(3):
                    async with session.get(client.router.url + "/health") as response:
                        assert "Connection" not in response.headers
                    certificates.issue()
                    assert await client.router.reload() == ["tls"]


async def test_tls_cannot_be_switched_on_by_a_reload(certificates: Certificates) -> None:
    async with FakeEngine().serving() as engine:
        plain = "\n".join(line for line in text(engine).splitlines() if "tls:" not in line)
        path = certificates.folder / "router.yaml"
        async with from_file(path, plain) as (client, write):
            write(text(engine, tls=""))
            status, answer = await Operator(client).ask("POST", "/admin/reload")
            assert (status, answer["error"]["param"]) == (409, "tls")


async def test_no_call_is_lost_while_certificates_are_replaced(certificates: Certificates) -> None:
    context = certificates.client()
    path = certificates.folder / "router.yaml"
    async with FakeEngine(num_tokens=20).serving() as engine:
        async with from_file(path, text(engine, tls="")) as (client, _):
            url, done, num_calls = client.router.url, asyncio.Event(), 0

            async def call() -> None:
                """Each call by a connection of its own, and every other one a stream."""
                nonlocal num_calls
                connector = aiohttp.TCPConnector(ssl=context, force_close=True)
                async with aiohttp.ClientSession(connector=connector) as session:
                    while not done.is_set():
                        body = {"stream": num_calls % 2 == 0}
                        async with session.post(url + CHAT, json=body) as response:
                            assert response.status == 200
                            await response.read()
                        num_calls += 1

            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(call())
                shown = set()
                for _ in range(8):
                    before = num_calls
                    certificates.issue()
                    assert await client.router.reload() == ["tls"]
                    shown.add(await serial(url, context))
                    await until(lambda before=before: num_calls >= before + 4)  # type: ignore[misc]
                done.set()

    assert len(shown) == 8
    assert num_calls == len(engine.received)


async def test_an_instance_whose_authority_was_replaced_is_called_no_more(
    certificates: Certificates, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.pem"
    certificates.authority.cert_pem.write_to_path(str(trusted))
    async with FakeEngine().serving(tls=certificates.server()) as engine:
        plain = text(engine).splitlines()
        tls = "tls: {ca_file: trusted.pem}"
        data = "\n".join(
            [plain[0], plain[2], f"instances: [{{id: a, url: '{engine.url}', {tls}}}]"]
        )
        async with from_file(tmp_path / "router.yaml", data) as (client, _):
            async with client.post() as response:
                assert response.status == 200
            upstream = client.router.upstreams["a"]
            trustme.CA().cert_pem.write_to_path(str(trusted))
            assert await client.router.reload() == ["instances"]
            await until(lambda: not healthy(client))
            certificates.authority.cert_pem.write_to_path(str(trusted))
            await client.router.reload()
            await until(lambda: healthy(client) == {"a"})
            async with client.post() as response:
                assert response.status == 200
            assert client.router.upstreams["a"] is upstream


async def test_what_the_router_shows_to_an_instance_is_read_again(
    certificates: Certificates, tmp_path: Path
) -> None:
    person = Person(certificates)  # the router, before the instance
    server = certificates.server()
    person.authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    stranger = trustme.CA().issue_cert("somebody@example.org")
    known = person.authority.issue_cert("somebody@example.org")

    def show(issued: trustme.LeafCert) -> None:
        issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "shown.pem"))

    show(stranger)
    async with FakeEngine().serving(tls=server) as engine:
        tls = f"{{ca_file: '{certificates.ca_file}', cert_file: shown.pem, key_file: shown.pem}}"
        data = "\n".join(
            [
                *(text(engine).splitlines()[i] for i in (0, 2)),
                f"instances: [{{id: a, url: '{engine.url}', tls: {tls}}}]",
            ]
        )
        async with from_file(tmp_path / "router.yaml", data) as (client, _):
            assert not healthy(client)
            show(known)
            assert await client.router.reload() == ["instances"]
            await until(lambda: healthy(client) == {"a"})
            show(stranger)
            await client.router.reload()
            await until(lambda: not healthy(client))
