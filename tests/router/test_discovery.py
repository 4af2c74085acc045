"""Instances that are found, and what becomes of them when they are found no more."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing, answered_by, healthy, names, port_of, until
from tests.router.sources import Named, discovering, write
from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.discovery import DnsLookup
from vllm_workflow.router.discovery_config import DnsSource
from vllm_workflow.router.instance_config import InstanceConfig

pytestmark = pytest.mark.anyio


async def test_a_file_brings_instances_and_takes_them_away(
    routing: Routing, tmp_path: Path
) -> None:
    path = tmp_path / "instances.yaml"
    async with FakeEngine().serving() as one, FakeEngine(held=True).serving() as two:
        write(path, {"url": one.url, "id": "one"})
        found = {"files": [{"path": str(path), "every_s": 0.05}]}
        async with routing(discovery=found) as client:
            assert await answered_by(client) == "one"

            write(path, {"url": two.url, "id": "two"})
            await until(lambda: names(client) == {"two"} == healthy(client))
            call = asyncio.create_task(answered_by(client))
            await two.wait_for(received=1)
            write(path, {"url": one.url, "id": "one"})
            await until(lambda: healthy(client) >= {"one"})
            assert await answered_by(client) == "one"
            two.release()
            # A call under way on an instance that has left ends there.
            assert await call == "two"
            await until(lambda: names(client) == {"one"})


async def test_a_file_that_cannot_be_used_changes_nothing_and_is_told_once(
    routing: Routing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "instances.yaml"
    async with FakeEngine().serving() as engine, FakeEngine().serving() as other:
        write(path, {"url": engine.url, "id": "one"})
        found = {"files": [{"path": str(path), "every_s": 0.02}]}
        async with routing(discovery=found) as client:
            for content, problem in (
                ("[", "not YAML"),
                ("a: 1", "expected a list of instances"),
                ("- {url: 'ftp://a'}", "0: url: expected http"),
            ):
                path.write_text(content)
                await until(lambda problem=problem: problem in caplog.text)
            path.unlink()
            await until(lambda: "No such file" in caplog.text)
            assert names(client) == {"one"}
            write(path, {"url": other.url, "id": "other"})
            await until(lambda: names(client) == {"other"})

    told = [record for record in caplog.records if "No such file" in record.getMessage()]
    assert len(told) == 1


async def test_a_name_with_several_addresses_is_several_instances() -> None:
    async def resolve(name: str, port: int) -> list[str]:
        return {"vllm": ["10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1"]}[name]

    template = {"models": ["m"], "api_key_env": ""}
    lookup = DnsLookup(DnsSource(name="vllm", port=8000, template=template), resolve)

    found = await lookup.find()

    assert [(each.id, each.url) for each in found] == [
        ("10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("10.0.0.2:8000", "http://10.0.0.2:8000"),
        ("[fd00::1]:8000", "http://[fd00::1]:8000"),
    ]
    assert found[0].models == ["m"]


async def test_a_name_is_looked_up_for_real(routing: Routing) -> None:
    async with FakeEngine().serving() as engine:
        found = {"dns": [{"name": "localhost", "port": port_of(engine)}]}
        async with routing(discovery=found) as client:
            assert await answered_by(client) == f"127.0.0.1:{port_of(engine)}"


@pytest.mark.parametrize("name", ["nowhere.invalid", "a..b"])
async def test_a_name_that_is_not_known_is_an_error_of_the_source(name: str) -> None:
    with pytest.raises(UpstreamError, match=rf"dns {re.escape(name)}"):
        await DnsLookup(DnsSource(name=name, port=1)).find()


async def test_a_source_that_breaks_is_asked_on_and_stops_no_other(
    routing: Routing, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        FakeEngine().serving() as engine,
        FakeEngine().serving() as second,
        FakeEngine().serving() as third,
        routing(engine) as client,
    ):
        broken = Named("broken")
        sound = Named("sound", [InstanceConfig(id="b", url=second.url)])
        async with discovering(client, broken, sound):
            await until(lambda: names(client) == {"a", "b"})
            await broken.asked_twice_more()
            broken.found = [InstanceConfig(id="c", url=third.url)]
            await until(lambda: names(client) == {"a", "b", "c"})

    assert [r.getMessage() for r in caplog.records if r.exc_info] == ["discovery: broken failed"]


async def test_two_ports_of_one_name_are_two_sources(routing: Routing) -> None:
    async with FakeEngine().serving() as one, FakeEngine().serving() as two:
        sources = [
            {"name": "localhost", "port": port_of(each), "every_s": 0.02} for each in (one, two)
        ]
        async with routing(discovery={"dns": sources}) as client:
            upstreams = client.router.upstreams
            assert len(healthy(client)) == 2
            seen = {(u.config.id, u.generation) for u in upstreams}
            for _ in range(2):  # each looks again, and lets the other's alone
                asked = one.num_health_asks + two.num_health_asks
                await until(lambda asked=asked: one.num_health_asks + two.num_health_asks > asked)
            assert {(u.config.id, u.generation) for u in upstreams} == seen


async def test_what_an_operator_has_drained_is_not_brought_back(routing: Routing) -> None:
    async with (
        FakeEngine().serving() as engine,
        FakeEngine().serving() as second,
        routing(engine) as client,
    ):
        upstreams, found = client.router.upstreams, InstanceConfig(id="b", url=second.url)
        source, other = Named("one", [found]), Named("two", [])
        async with discovering(client, source, other):
            await until(lambda: names(client) == {"a", "b"})
            upstreams.drain_for_good("b")
            other.found = [found]
            await until(lambda: names(client) == {"a"})
            await source.asked_twice_more()
            await other.asked_twice_more()
            assert names(client) == {"a"}

            upstreams.add(found)  # an operator does
            upstreams.drain("b")
            await until(lambda: "b" in names(client) and not upstreams["b"].leaving)
            upstreams.drain_for_good("b")
            await until(lambda: names(client) == {"a"})
            source.found = other.found = []
            await source.asked_twice_more()
            await other.asked_twice_more()
            source.found = [found]
            await until(lambda: names(client) == {"a", "b"})


async def test_that_an_instance_is_there_already_is_told_once(
    routing: Routing, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        source = Named("found", [InstanceConfig(id="a", url=engine.url)])
        async with discovering(client, source):
            await source.asked_twice_more()
            await source.asked_twice_more()

    told = [r for r in caplog.records if "there already" in r.getMessage()]
    assert len(told) == 1


async def test_what_is_configured_stays_whatever_is_found(routing: Routing, tmp_path: Path) -> None:
    path = tmp_path / "instances.yaml"
    async with FakeEngine().serving() as one, FakeEngine().serving() as two:
        write(path, {"url": two.url, "id": "a"}, {"url": two.url, "id": "b"})
        found = {"files": [{"path": str(path), "every_s": 0.05}]}
        async with routing(one, discovery=found) as client:
            assert client.router.upstreams["a"].url == one.url
            write(path)
            await until(lambda: names(client) == {"a"})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "instances: expected at least one, or `discovery`"),
        ({"discovery": {"dns": [{"name": "a", "port": 0}]}}, r"discovery\.dns\.0\.port"),
        (
            {"discovery": {"dns": [{"name": "a", "port": 1, "template": {"url": "x"}}]}},
            "expected no",
        ),
        (
            {"discovery": {"dns": [{"name": "a", "port": 1, "template": {"seats": 1}}]}},
            "seats: unknown field",
        ),
        ({"discovery": {"kubernetes": [{"service": "A/../b"}]}}, r"kubernetes\.0\.service"),
        (
            {"discovery": {"dns": [{"name": "a", "port": 1}, {"name": "a", "port": 1}]}},
            r"discovery: declared twice: \['dns a:1'\]",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_at_the_start(data: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        RouterConfig.from_mapping(data, source="test")
