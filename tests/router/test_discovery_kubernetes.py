"""Instances that are pods of a Kubernetes service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.fakes import FakeEngine, listening
from tests.router.conftest import Routing, answered_by, healthy, names, port_of, until

pytestmark = pytest.mark.anyio


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
        async with listening(app) as self.url:
            yield self

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
