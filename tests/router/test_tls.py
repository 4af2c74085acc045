"""TLS to clients and to instances, with certificates made for the occasion."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from tests.fakes import FakeEngine
from tests.router.conftest import CHAT, Routing
from tests.router.test_router_process import process
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.credentials import KeyHash, new_key

pytestmark = pytest.mark.anyio


class Certificates:
    """An authority, and files that it has signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self.authority.cert_pem.write_to_path(self.ca_file)
        self.issue()

    def issue(self) -> None:
        """Write a new certificate for this machine over the last one."""
        issued = self.authority.issue_cert("127.0.0.1", "localhost")
        self.cert_file, self.key_file = (str(self.folder / n) for n in ("cert.pem", "key.pem"))
        issued.private_key_pem.write_to_path(self.key_file)
        Path(self.cert_file).write_bytes(b"".join(b.bytes() for b in issued.cert_chain_pems))

    def spoil(self) -> None:
        Path(self.cert_file).write_text("no certificate", "utf-8")

    @property
    def files(self) -> dict[str, str]:
        return {"cert_file": self.cert_file, "key_file": self.key_file}

    def server(self, *, asks: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert_file, self.key_file)
        if asks:
            self.authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self, *, shows: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if shows:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@asynccontextmanager
async def trusting(context: ssl.SSLContext) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


async def test_clients_are_answered_over_tls(routing: Routing, certificates: Certificates) -> None:
    admin = {"port": 0, "key_hash": str(KeyHash.of(new_key()))}
    async with FakeEngine().serving() as engine:
        async with routing(engine, tls=certificates.files, admin=admin) as client:
            assert client.router.url.startswith("https://")
            assert client.router.admin_url.startswith("https://")
            async with trusting(certificates.client()) as session:
                async with session.post(client.router.url + CHAT, json={}) as response:
                    assert response.status == 200
            plain = client.router.url.replace("https", "http")
            with pytest.raises(aiohttp.ClientError):
                async with client.session.get(plain + "/health"):
                    pass


async def test_clients_may_be_asked_for_a_certificate(
    routing: Routing, certificates: Certificates
) -> None:
    tls = certificates.files | {"client_ca_file": certificates.ca_file}
    async with FakeEngine().serving() as engine, routing(engine, tls=tls) as client:
        url = client.router.url + CHAT
        async with trusting(certificates.client(shows=True)) as session:
            async with session.post(url, json={}) as response:
                assert response.status == 200
        async with trusting(certificates.client()) as session:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
                async with session.post(url, json={}):
                    pass


@pytest.mark.parametrize("asks", [True, False])
async def test_an_instance_is_called_and_probed_over_tls(
    routing: Routing, certificates: Certificates, asks: bool
) -> None:
    tls = {"ca_file": certificates.ca_file} | (certificates.files if asks else {})
    async with FakeEngine().serving(tls=certificates.server(asks=asks)) as engine:
        instance = {"id": "a", "url": engine.url, "tls": tls}
        async with routing(instances=[instance]) as client:
            async with client.post() as response:
                assert response.status == 200
            async with client.get("/v1/models") as response:
                assert len((await response.json())["data"]) == 1


@pytest.mark.parametrize(("tls", "healthy"), [({}, False), ({"verify": False}, True)])
async def test_an_instance_that_nobody_vouches_for_is_not_called(
    routing: Routing, certificates: Certificates, tls: Any, healthy: bool
) -> None:
    async with FakeEngine().serving(tls=certificates.server()) as engine:
        instance = {"id": "a", "url": engine.url, "models": ["m"], "tls": tls}
        async with routing(instances=[instance]) as client:
            async with client.get("/health") as response:
                assert (await response.json())["instances"] == {"a": healthy}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tls": {"cert_file": "no", "key_file": "no"}}, "tls: cert_file, key_file: expected a"),
        ({"tls": {"cert_file": "{ca_file}", "key_file": "{ca_file}"}}, "tls: cert_file, key_file:"),
        ({"tls": {"cert_file": "{cert_file}"}}, "tls.key_file: expected a value, got none"),
        (
            {"instances": [{"url": "https://a:1", "tls": {"ca_file": "no"}}]},
            "instances.0.tls: ca_file: expected certificates in PEM, got no: No such file",
        ),
        (
            {"instances": [{"url": "https://a:1", "tls": {"cert_file": "{cert_file}"}}]},
            "instances.0.tls: expected cert_file and key_file together",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_files_that_are_no_certificates_are_named(
    certificates: Certificates, section: Any, message: str
) -> None:
    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        if isinstance(value, list):
            return [fill(v) for v in value]
        return value.format_map(vars(certificates)) if isinstance(value, str) else value

    data = {"instances": [{"url": "http://a:1"}]} | fill(section)
    with pytest.raises(ConfigError, match=f"^router.yaml: {message}"):
        RouterConfig.from_mapping(data, source="router.yaml")


async def serial(url: str, context: ssl.SSLContext) -> int:
    """Return the serial number of the certificate that a server shows."""
    host, _, port = url.partition("://")[2].partition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert()
    writer.close()
    return int(shown["serialNumber"], 16)


async def test_a_new_certificate_is_shown_after_sighup(certificates: Certificates) -> None:
    path = certificates.folder / "router.yaml"
    async with FakeEngine().serving() as engine:
        path.write_text(
            f"port: 0\ntls: {{cert_file: cert.pem, key_file: key.pem}}\n"
            f"instances: [{{id: a, url: '{engine.url}'}}]\n",
            "utf-8",
        )
        context = certificates.client()
        async with process("--config", str(path)) as (running, url), asyncio.timeout(20):
            old = await serial(url, context)
            certificates.spoil()
            running.send_signal(signal.SIGHUP)  # changes nothing
            assert await serial(url, context) == old
            certificates.issue()
            running.send_signal(signal.SIGHUP)
            while await serial(url, context) == old:
                await asyncio.sleep(0.02)
            async with trusting(context) as session:
                async with session.post(url + CHAT, json={}) as response:
                    assert response.status == 200
            running.terminate()
            assert await running.wait() == 0
