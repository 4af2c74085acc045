"""What metrics and the log say of a call that the router refuses itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.router.conftest import Routing
from vllm_workflow.router.credentials import KeyHash, new_key

pytestmark = pytest.mark.anyio
RUN = {"X-Workflow-Id": "r1", "X-Workflow-Stage": "draft", "X-Tenant-Id": "acme"}
AUTH = {"keys": [{"tenant": "acme", "key_hash": str(KeyHash.of(new_key()))}]}


@pytest.mark.parametrize(
    ("config", "call", "status"),
    [
        ({}, {"body": b"{"}, 400),
        ({}, {"headers": {"X-Workflow-Slo-Ms": "soon"}}, 400),
        ({"auth": AUTH}, {}, 401),
        ({}, {"body": {"model": "other", "messages": []}}, 404),
        ({"max_body_mb": 0.001}, {"body": b" " * 2_000}, 413),
        ({"tenants": {"default": {"tokens_per_minute": 1}}}, {"headers": RUN}, 429),
    ],
)
async def test_a_refused_call_counts_with_the_status_that_the_client_got(
    routing: Routing, config: dict[str, Any], call: dict[str, Any], status: int
) -> None:
    async with FakeEngine().serving() as engine, routing(engine, **config) as client:
        async with client.post(**call) as response:
            assert response.status == status, await response.text()
        stage = "draft" if status == 429 else ""
        counted = await client.metric(
            "requests_total", instance="", stage=stage, status=str(status)
        )
        left = await client.metric("client_disconnects_total")

    assert counted == 1.0
    assert left == 0.0


async def test_the_log_names_a_call_that_could_not_be_read(
    routing: Routing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vllm_workflow.calls")
    async with FakeEngine().serving() as engine, routing(engine) as client:
        headers = RUN | {"X-Request-Id": "q1", "X-Workflow-Name": "x" * 300}
        async with client.post(b"{", headers=headers) as response:
            assert response.status == 400

    (line,) = [r for r in caplog.records if r.name == "vllm_workflow.calls"]
    said = {n: getattr(line, n) for n in ("status", "request", "run", "stage", "tenant")}
    assert said == {"status": 400, "request": "q1", "run": "r1", "stage": "draft", "tenant": "acme"}
    assert line.__dict__["workflow"] == ""  # what is no label is not repeated
