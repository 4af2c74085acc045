"""The OpenAPI document says what the application does."""

from __future__ import annotations

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.router.openapi import document
from vllm_workflow.router.wire import OWN_HEADERS

pytestmark = pytest.mark.anyio


async def test_every_route_is_in_the_document_and_the_other_way_round(routing: Routing) -> None:
    async with FakeEngine().serving() as engine, routing(engine) as client:
        routes = {
            (route.method.lower(), route.resource.canonical)
            for route in client.router.app.router.routes()
            if route.resource is not None and route.method not in {"HEAD", "*"}
        }
        async with client.get("/openapi.json") as response:
            told = await response.json()

    assert told == document()
    assert routes == {(m, path) for path, methods in told["paths"].items() for m in methods}


def test_every_header_of_ours_is_in_the_document() -> None:
    post = document()["paths"]["/v1/chat/completions"]["post"]

    assert {parameter["name"] for parameter in post["parameters"]} == set(OWN_HEADERS)
