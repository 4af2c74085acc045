"""Spans of runs and calls, as a collector gets them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.fakes import FakeEngine, Received, listening
from tests.router.conftest import Routing
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.config import RouterConfig

pytestmark = pytest.mark.anyio
SECRET = "the-prompt-nobody-should-see"


@dataclass
class Collector:
    """Takes OTLP over HTTP."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)
    raw: bytes = b""

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    async def _take(self, request: web.Request) -> web.Response:
        self.raw += await request.read()
        message = ExportTraceServiceRequest.FromString(await request.read())
        for resource in message.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(),
            content_type="application/x-protobuf",
        )


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector._take)
    async with listening(app) as url:
        collector.url = f"{url}/v1/traces"
        yield collector


def attributes(span: Any) -> dict[str, Any]:
    return {
        a.key.removeprefix("vllm_workflow."): getattr(a.value, a.value.WhichOneof("value"))
        for a in span.attributes
    }


def parent_of(received: Received) -> tuple[str, str, bool]:
    """Trace, span, and whether it is sampled, as the engine was told."""
    version, trace_id, span_id, flags = (received.header("traceparent") or "").split("-")
    assert version == "00"
    return trace_id, span_id, bool(int(flags, 16) & 1)


async def test_calls_are_children_of_their_run_and_the_engine_is_told_of_them(
    routing: Routing,
) -> None:
    async with collecting() as collector, FakeEngine().serving() as engine:
        async with routing(engine, tracing={"otlp_endpoint": collector.url}) as client:
            for stage in ("draft", "polish"):
                headers = {
                    "X-Workflow-Id": "r1",
                    "X-Workflow-Name": "report",
                    "X-Workflow-Stage": stage,
                    "X-Workflow-Slo-Ms": "60000",
                    "X-Workflow-Final": str(stage == "polish").lower(),
                }
                messages = [{"role": "user", "content": SECRET}]
                async with client.post(headers=headers, messages=messages) as response:
                    assert response.status == 200

    (run,) = collector.named("run report")
    (draft,) = collector.named("call draft")
    (polish,) = collector.named("call polish")
    assert {draft.parent_span_id, polish.parent_span_id} == {run.span_id}
    assert {span.trace_id for span in (run, draft, polish)} == {run.trace_id}
    assert attributes(run)["deadline_met"] is True
    assert attributes(draft)["instance"] == "a"
    assert attributes(draft)["http.response.status_code"] == 200
    (dispatched,) = draft.events
    assert dispatched.name == "dispatched"
    assert 0.0 < attributes(dispatched)["slack_s"] < 60.0
    for span, received in zip((draft, polish), engine.received, strict=True):
        assert parent_of(received) == (span.trace_id.hex(), span.span_id.hex(), True)
    assert SECRET.encode() not in collector.raw


async def test_a_clients_own_trace_is_continued(routing: Routing) -> None:
    trace_id, parent = "ab" * 16, "cd" * 8
    async with collecting() as collector, FakeEngine().serving() as engine:
        async with routing(engine, tracing={"otlp_endpoint": collector.url}) as client:
            headers = {"traceparent": f"00-{trace_id}-{parent}-01", "X-Workflow-Stage": "s"}
            async with client.post(headers=headers) as response:
                assert response.status == 200

    (span,) = collector.named("call s")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace_id, parent)
    assert parent_of(engine.received[0]) == (trace_id, span.span_id.hex(), True)


async def test_a_call_that_moves_shows_where_it_has_been(routing: Routing) -> None:
    async with collecting() as collector, FakeEngine().serving() as good:
        broken = FakeEngine(dies_after=0)
        async with (
            broken.serving(),
            routing(broken, good, tracing={"otlp_endpoint": collector.url}) as client,
        ):
            while not broken.received:
                async with client.post(headers={"X-Workflow-Stage": "s"}) as response:
                    assert response.status == 200

    moved = [span for span in collector.named("call s") if len(span.events) > 1]
    been = [attributes(event)["instance"] for event in moved[0].events]
    assert (been[0], been[-1], attributes(moved[0])["instance"]) == ("a", "b", "b")


async def test_nothing_is_kept_of_traces_that_are_not_sampled(routing: Routing) -> None:
    async with collecting() as collector, FakeEngine().serving() as engine:
        tracing = {"otlp_endpoint": collector.url, "sample_ratio": 0.0}
        async with routing(engine, tracing=tracing) as client, client.post() as response:
            assert response.status == 200

    assert collector.spans == []
    assert not parent_of(engine.received[0])[2]


async def test_a_collector_that_is_away_disturbs_no_call(routing: Routing) -> None:
    async with FakeEngine().serving() as engine:
        tracing = {"otlp_endpoint": "http://127.0.0.1:9/v1/traces", "sample_ratio": 0.5}
        async with routing(engine, tracing=tracing) as client, client.post() as response:
            assert response.status == 200


def test_what_is_no_url_is_refused() -> None:
    data = {"instances": [{"url": "http://a:1"}], "tracing": {"otlp_endpoint": "collector:4318"}}

    with pytest.raises(ConfigError, match=r"tracing\.otlp_endpoint: .*expected http"):
        RouterConfig.from_mapping(data, source="test")
