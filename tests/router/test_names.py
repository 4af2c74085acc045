"""Names of instances when nobody can look them up, and when they move."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

import vllm_workflow.router.upstreams as upstreams_module
from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.router import names as names_module
from vllm_workflow.router.names import Name, Names

pytestmark = pytest.mark.anyio

AGAIN = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
NONAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


class NameService:
    """What the operating system asks; `engine.test` is at `address`, unless it has an `error`."""

    def __init__(self) -> None:
        self.address = "127.0.0.1"
        self.error: Exception | None = None
        self.hangs = False
        self.num_asked = 0

    async def getaddrinfo(self, host: str, port: int, **kwargs: Any) -> Any:
        assert host == "engine.test"
        self.num_asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.error:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (self.address, port))]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> NameService:
    """Names are looked up here, and whenever they are needed."""
    found = NameService()
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", found.getaddrinfo)
    monkeypatch.setattr(names_module, "FRESH_S", 0.0)
    monkeypatch.setattr(names_module, "RETRY_S", 0.0)
    monkeypatch.setattr(names_module, "PATIENCE_S", 0.05)
    return found


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def address(name: Name) -> object:
    async with asyncio.timeout(1):
        return (await name.addresses())[0][4][0]


@pytest.mark.parametrize("outage", ["fails", "hangs", "denies"])
async def test_an_instance_stays_and_comes_back_while_its_name_cannot_be_looked_up(
    routing: Routing, service: NameService, monkeypatch: pytest.MonkeyPatch, outage: str
) -> None:
    monkeypatch.setattr(upstreams_module, "PROBE_EVERY_S", 0.02)
    monkeypatch.setattr(upstreams_module, "PROBE_SICK_EVERY_S", 0.02)
    engine = FakeEngine()
    async with AsyncExitStack() as router:
        async with engine.serving():
            port = int(engine.url.rpartition(":")[2])
            client = await router.enter_async_context(routing(f"http://engine.test:{port}"))
            upstreams = client.router.upstreams
            service.hangs = outage == "hangs"
            service.error = {"fails": AGAIN, "denies": NONAME}.get(outage)

            async def status() -> int:
                async with client.post() as response:
                    return int(response.status)

            # More than there are kept connections.
            assert set(await asyncio.gather(*(status() for _ in range(10)))) == {200}
        await until(lambda: not upstreams.is_healthy(upstreams["a"]))
        async with engine.serving(port):
            await until(lambda: upstreams.is_healthy(upstreams["a"]))
            assert await status() == 200


async def test_a_name_that_moves_is_followed(service: NameService) -> None:
    name = Name("engine.test", 80)
    assert await address(name) == "127.0.0.1"
    service.error = AGAIN
    assert await address(name) == "127.0.0.1"
    service.address, service.error = "127.0.0.2", None
    assert await address(name) == "127.0.0.2"


async def test_a_lookup_that_hangs_is_not_waited_for_twice(service: NameService) -> None:
    name = Name("engine.test", 80)
    await address(name)
    service.hangs = True
    await address(name)
    begin = asyncio.get_running_loop().time()
    for _ in range(20):
        await address(name)
    assert asyncio.get_running_loop().time() - begin < 0.5
    assert service.num_asked == 2


async def test_a_name_that_was_never_found_is_asked_for_again(service: NameService) -> None:
    name = Name("engine.test", 80)
    service.error = AGAIN
    with pytest.raises(OSError, match=r"cannot look up engine\.test: .*Temporary failure"):
        await name.addresses()
    service.error = None
    assert await address(name) == "127.0.0.1"


async def test_a_name_that_does_not_exist_any_more_is_gone_after_a_while(
    service: NameService, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = Name("engine.test", 80)
    await address(name)
    service.error = NONAME
    await address(name)
    monkeypatch.setattr(names_module, "GONE_S", 0.0)
    with pytest.raises(OSError, match="not known"):
        await name.addresses()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_an_address_is_not_looked_up(service: NameService, host: str) -> None:
    service.hangs = True
    assert await address(Name(host, 80)) == host
    (found,) = await Names().resolve(host, 80)
    assert (found["host"], found["port"]) == (host, 80)
