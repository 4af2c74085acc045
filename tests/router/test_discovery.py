"""Instances that are found, and what becomes of them when they are found no more."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from aiohttp import web

from tests.fakes import FakeEngine
from tests.router.conftest import Client, Routing
from vllm_workflow.core.errors import ConfigError, UpstreamError
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.discovery import Discovery, DnsLookup, FileWatch
from vllm_workflow.router.discovery_config import DnsSource, FileSource
from vllm_workflow.router.instance_config import InstanceConfig

pytestmark = pytest.mark.anyio


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until something holds; the test's own timeout ends it."""
    async with asyncio.timeout(60):
        while True:
            result = holds()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.02)


def healthy(client: Client) -> set[str]:
    upstreams = client.router.upstreams
    return {u.config.id for u in upstreams if upstreams.is_healthy(u)}


def names(client: Client) -> set[str]:
    return {upstream.config.id for upstream in client.router.upstreams}


async def answered_by(client: Client) -> str:
    async with client.post() as response:
        assert response.status == 200
        return str(response.headers["X-Workflow-Instance"])


def write(path: Path, *instances: dict[str, Any]) -> None:
    """Replace the file as a whole, as configuration managers do."""
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump(list(instances)), encoding="utf-8")
    os.replace(new, path)


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


@dataclass
class ApiServer:
    """As much of Kubernetes as is asked."""

    items: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    url: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ApiServer]:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*runner.addresses[0][:2])
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        labels = request.query.get("labelSelector", "")
        self.asked.append((request.path, labels, request.headers.get("Authorization", "")))
        return web.json_response({"items": self.items}, status=self.status)


def slice_of(*endpoints: tuple[str, FakeEngine, bool | None]) -> list[dict[str, Any]]:
    """One slice per endpoint, as ports may differ; `None` leaves its readiness out."""
    return [
        {
            "ports": [{"name": "metrics", "port": 9}, {"name": "http", "port": port_of(engine)}],
            "endpoints": [
                {
                    "addresses": ["127.0.0.1"],
                    "conditions": {} if ready is None else {"ready": ready},
                    "targetRef": {"kind": "Pod", "name": pod},
                }
            ],
        }
        for pod, engine, ready in endpoints
    ]


def port_of(engine: FakeEngine) -> int:
    return int(engine.url.rpartition(":")[2])


async def test_ready_pods_of_a_service_are_taken_in(routing: Routing, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-token\n")
    async with (
        ApiServer().serving() as api,
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
    ):
        api.items = slice_of(("pod-1", one, None), ("pod-2", two, False))
        found = {
            "kubernetes": [
                {
                    "service": "vllm",
                    "namespace": "llm",
                    "port": "http",
                    "api_url": api.url,
                    "token_file": str(token),
                    "every_s": 0.05,
                    "template": {"max_num_seqs": 7},
                }
            ]
        }
        async with routing(discovery=found) as client:
            assert names(client) == healthy(client) == {"pod-1"}
            assert client.router.dispatcher.fleet.instance("pod-1").max_num_seqs == 7
            api.items = slice_of(("pod-2", two, True))
            await until(lambda: names(client) == {"pod-2"} == healthy(client))
            assert await answered_by(client) == "pod-2"

            # A slice without an address says nothing of the others.
            api.items = [
                {"ports": [{"name": "http", "port": 1}], "endpoints": [{"addresses": []}]},
                *slice_of(("pod-1", one, True)),
            ]
            await until(lambda: names(client) == {"pod-1"} == healthy(client))
            api.items = slice_of(("pod-2", two, True))
            await until(lambda: names(client) == {"pod-2"} == healthy(client))

            # The API server is away, or forbids: what is there stays.
            api.status = 403
            num_asked = len(api.asked)
            await until(lambda: len(api.asked) > num_asked + 2)
            assert names(client) == {"pod-2"}

    wanted = "/apis/discovery.k8s.io/v1/namespaces/llm/endpointslices"
    assert set(api.asked) == {(wanted, "kubernetes.io/service-name=vllm", "Bearer the-token")}


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


@dataclass
class Named:
    """A source that names what the test says, or fails."""

    name: str
    found: list[InstanceConfig] | None = None
    every_s: float = 0.01
    num_asked: int = 0

    async def find(self) -> list[InstanceConfig] | None:
        self.num_asked += 1
        if self.found is None:
            raise RuntimeError("broken")
        return self.found

    async def asked_twice_more(self) -> None:
        num_before = self.num_asked
        await until(lambda: self.num_asked >= num_before + 2)


@asynccontextmanager
async def discovering(client: Client, *sources: Named) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(Discovery(sources, client.router.upstreams).run())
        yield
        task.cancel()


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


async def test_an_instance_whose_key_is_missing_is_taken_in_when_the_key_is_there(
    routing: Routing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, key = tmp_path / "instances.yaml", tmp_path / "key"
    async with FakeEngine().serving() as other, FakeEngine(api_key="the-key").serving() as engine:
        write(path, {"url": engine.url, "id": "b", "api_key_file": "key"})
        found = {"files": [{"path": str(path), "every_s": 0.02}]}
        async with routing(other, discovery=found) as client:
            await until(lambda: "cannot read a key" in caplog.text)
            assert names(client) == {"a"}
            key.write_text("the-key")
            # Found in the folder of the file that names it.
            await until(lambda: "b" in healthy(client))


async def test_a_key_that_was_replaced_is_sent_without_a_reload_where_instances_are_looked_up(
    routing: Routing, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("the-old-key")
    async with FakeEngine(api_key="the-new-key").serving() as engine:
        template = {"api_key_file": str(key)}
        source = {"name": "localhost", "port": port_of(engine), "every_s": 0.02}
        async with routing(discovery={"dns": [source | {"template": template}]}) as client:
            assert len(names(client)) == 1
            assert not healthy(client)
            key.write_text("the-new-key")
            await until(lambda: healthy(client) == names(client))


@pytest.mark.parametrize("names", ["one", "dir/two"])
async def test_a_key_that_was_replaced_is_sent_without_a_reload_where_a_watched_file_names_it(
    routing: Routing, tmp_path: Path, names: str
) -> None:
    path, key = tmp_path / "instances.yaml", tmp_path / names
    key.parent.mkdir(exist_ok=True)
    key.write_text("the-old-key")
    async with FakeEngine(api_key="the-new-key").serving() as engine:
        write(path, {"url": engine.url, "id": "b", "api_key_file": names})
        found = {"files": [{"path": str(path), "every_s": 0.02}]}
        async with routing(discovery=found) as client:
            assert not healthy(client)
            key.write_text("the-new-key")
            await until(lambda: healthy(client) == {"b"})


async def test_a_file_that_names_others_is_not_read_again_until_one_of_them_changes(
    tmp_path: Path,
) -> None:
    path, authority = tmp_path / "instances.yaml", tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    write(path, {"url": "https://a:1", "tls": {"ca_file": "ca.pem"}})
    watch = FileWatch(FileSource(path=str(path)))

    (first,) = await watch.find() or ()
    assert await watch.find() is None
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "new.pem"))
    os.replace(tmp_path / "new.pem", authority)
    (second,) = await watch.find() or ()
    assert await watch.find() is None

    assert first != second
    assert first.ssl is not second.ssl


def test_paths_in_what_instances_share_are_relative_to_the_file_that_names_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "key").write_text("the-key")
    (tmp_path / "certs").mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "certs/ca.pem"))
    template = "template: {api_key_file: key, tls: {ca_file: certs/ca.pem}}"
    path = tmp_path / "router.yaml"
    path.write_text(
        "discovery:\n"
        f"  dns: [{{name: vllm, port: 1, scheme: https, {template}}}]\n"
        f"  kubernetes: [{{service: vllm, token_file: token, {template}}}]\n"
    )

    config = RouterConfig.from_file(path)

    assert config.discovery is not None
    (by_name,), (pods,) = config.discovery.dns, config.discovery.kubernetes
    assert by_name.template == pods.template
    assert by_name.template["api_key_file"] == str(tmp_path / "key")
    assert by_name.template["tls"]["ca_file"] == str(tmp_path / "certs/ca.pem")
    assert pods.token_file == str(tmp_path / "token")
    assert pods.ca_file.startswith("/var/run/secrets/")


async def test_certificates_are_loaded_once_for_what_they_hold_and_not_by_the_event_loop(
    tmp_path: Path,
) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    addresses = ["10.0.0.1", "10.0.0.2"]

    async def resolve(name: str, port: int) -> list[str]:
        return addresses

    source = DnsSource(
        name="vllm", port=8000, scheme="https", template={"tls": {"ca_file": str(authority)}}
    )
    lookup = DnsLookup(source, resolve)
    read_by: list[int] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(authority):
            read_by.append(threading.get_ident())

    sys.addaudithook(watch)
    first, second, third = [*await lookup.find(), *(await lookup.find())[:1]]
    trustme.CA().cert_pem.write_to_path(str(authority))
    (renewed, _) = await lookup.find()

    assert first.ssl is second.ssl is third.ssl
    assert first == third
    assert renewed.ssl is not first.ssl
    assert renewed != first
    assert read_by.count(threading.get_ident()) == 1  # written above
    assert len(read_by) > 1


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


async def test_two_ports_of_the_same_pods_are_two_sources(routing: Routing, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("token")
    async with (
        ApiServer().serving() as api,
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
    ):
        api.items = [
            {
                "ports": [{"name": "a", "port": port_of(one)}, {"name": "b", "port": port_of(two)}],
                "endpoints": [{"addresses": ["127.0.0.1"], "targetRef": {"name": "pod"}}],
            }
        ]
        common = {"api_url": api.url, "token_file": str(tmp_path / "token"), "service": "vllm"}
        sources = [{**common, "port": port} for port in ("a", "b")]
        async with routing(discovery={"kubernetes": sources}) as client:
            assert healthy(client) == {f"pod:{port_of(one)}", f"pod:{port_of(two)}"}
        # Another service may select the same pods.
        another = {**sources[1], "service": "another"}
        async with routing(discovery={"kubernetes": [sources[0], another]}) as client:
            assert healthy(client) == {f"pod:{port_of(one)}", f"pod:{port_of(two)}"}
            assert len(names(client)) == 2
        another["port"] = "a"
        async with routing(discovery={"kubernetes": [sources[0], another]}) as client:
            assert names(client) == {f"pod:{port_of(one)}"}
        # A pod's name is enough where nobody else can mean it.
        async with routing(discovery={"kubernetes": sources[:1]}) as client:
            assert names(client) == {"pod"}


async def test_pods_of_one_name_in_several_namespaces_and_clusters_are_told_apart(
    routing: Routing, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("token")
    async with (
        ApiServer().serving() as api,
        ApiServer().serving() as far,
        FakeEngine().serving() as one,
        FakeEngine().serving() as two,
    ):
        (both,) = slice_of(("pod", one, True))
        both["ports"].append({"name": "other", "port": port_of(two)})
        api.items = far.items = [both]
        here = {"service": "s", "api_url": api.url, "token_file": str(tmp_path / "token")}
        first = {**here, "namespace": "x", "port": "http"}
        second = {**here, "namespace": "y", "port": "other"}
        async with routing(discovery={"kubernetes": [first, second]}) as client:
            assert names(client) == {"pod.x", "pod.y"}
        second |= {"api_url": far.url, "namespace": "x"}
        async with routing(discovery={"kubernetes": [first, second]}) as client:
            ports = (port_of(one), port_of(two))
            assert names(client) == {f"127.0.0.1:{port}" for port in ports}


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
