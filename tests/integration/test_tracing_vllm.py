"""Spans of a real vLLM server join those of the router; the collector takes OTLP over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.integration.vllm_process import VllmServer, serving
from tests.router.test_tracing import Collector, attributes, collecting
from vllm_workflow.router.app import serve
from vllm_workflow.router.config import RouterConfig

grpc = pytest.importorskip("grpc")  # comes with vLLM
services = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")

pytestmark = pytest.mark.anyio
SECRET = "the-prompt-nobody-should-see"
CLIENT_TRACE, CLIENT_SPAN = "ab" * 16, "cd" * 8


class GrpcCollector(services.TraceServiceServicer):
    """Takes what vLLM sends unless it is told otherwise."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._requests: list[Any] = []
        self.raw = b""

    def Export(self, request: Any, context: Any) -> Any:
        with self._news:
            self.raw += ExportTraceServiceRequest.SerializeToString(request)
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._requests += [s for s in scope.spans if s.name == "llm_request"]
            self._news.notify_all()
        return ExportTraceServiceResponse()

    async def requests(self, wanted: Callable[[Any], bool], number: int) -> list[Any]:
        """Wait for so many `llm_request` spans of a kind."""

        def found() -> list[Any]:
            return [span for span in self._requests if wanted(span)]

        def wait() -> list[Any]:
            with self._news:
                assert self._news.wait_for(lambda: len(found()) >= number, timeout=120)
                return found()

        return await asyncio.to_thread(wait)


@pytest.fixture(scope="module")
def engine_spans() -> Iterator[tuple[GrpcCollector, str]]:
    """A collector, and where it listens."""
    collector = GrpcCollector()
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    services.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@pytest.fixture(scope="module")
def vllm_server(
    engine_spans: tuple[GrpcCollector, str],
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VllmServer]:
    log_path = tmp_path_factory.mktemp("vllm") / "server.log"
    flags = ("--scheduler", "workflow", "--otlp-traces-endpoint", engine_spans[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # it sends every 5 s otherwise
        with serving(tiny_model, log_path, flags) as server:
            yield server


class Client:
    """Calls a router."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = f"{url}/v1/completions"
        self._session = session

    async def call(self, stage: str, *, stream: bool = False, **headers: str) -> None:
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 4, "stream": stream}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers |= {"X-Workflow-Stage": stage, "X-Workflow-Name": "report"}
        async with self._session.post(self._url, json=body, headers=headers) as response:
            text = await response.text()
            assert response.status == 200, text


@asynccontextmanager
async def routing(server: VllmServer) -> AsyncIterator[tuple[Client, Collector]]:
    """A client of a router that traces, and what the router tells until it stops."""
    async with collecting() as collector:
        config = {
            "port": 0,
            "instances": [{"id": "tiny", "url": server.base_url}],
            "tracing": {"otlp_endpoint": collector.url},
        }
        async with (
            serve(RouterConfig.from_mapping(config, source="test")) as router,
            aiohttp.ClientSession() as session,
        ):
            yield Client(router.url, session), collector


def in_trace(trace_id: bytes) -> Callable[[Any], bool]:
    return lambda span: bool(span.trace_id == trace_id)


async def test_the_engines_span_of_each_call_is_a_child_of_the_routers(
    vllm_server: VllmServer, engine_spans: tuple[GrpcCollector, str]
) -> None:
    async with routing(vllm_server) as (client, collector):
        await client.call("draft", X_Workflow_Id="r1")
        await client.call("polish", stream=True, X_Workflow_Id="r1", X_Workflow_Final="true")

    (run,) = collector.named("run report")
    calls = [*collector.named("call draft"), *collector.named("call polish")]
    requests = await engine_spans[0].requests(in_trace(run.trace_id), 2)
    assert {call.trace_id for call in calls} == {run.trace_id}
    assert {call.parent_span_id for call in calls} == {run.span_id}
    assert {span.parent_span_id for span in requests} == {call.span_id for call in calls}
    for span in requests:
        (call,) = (call for call in calls if call.span_id == span.parent_span_id)
        told = attributes(span)
        assert told["gen_ai.usage.completion_tokens"] == 4
        assert attributes(call)["request"] in told["gen_ai.request.id"]
        assert call.start_time_unix_nano <= span.end_time_unix_nano
    assert SECRET.encode() not in collector.raw + engine_spans[0].raw


async def test_a_clients_trace_reaches_the_engine(
    vllm_server: VllmServer, engine_spans: tuple[GrpcCollector, str]
) -> None:
    async with routing(vllm_server) as (client, collector):
        await client.call("traced", traceparent=f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01")

    (call,) = collector.named("call traced")
    (span,) = await engine_spans[0].requests(in_trace(bytes.fromhex(CLIENT_TRACE)), 1)
    assert (call.trace_id.hex(), call.parent_span_id.hex()) == (CLIENT_TRACE, CLIENT_SPAN)
    assert span.parent_span_id == call.span_id


async def test_what_a_client_does_not_want_traced_is_traced_nowhere(
    vllm_server: VllmServer, engine_spans: tuple[GrpcCollector, str]
) -> None:
    untraced, traced = "ef" * 16, "fe" * 16
    async with routing(vllm_server) as (client, collector):
        await client.call("quiet", traceparent=f"00-{untraced}-{CLIENT_SPAN}-00")
        await client.call("after", traceparent=f"00-{traced}-{CLIENT_SPAN}-01")

    # Spans come in order, so what comes after has come after it.
    await engine_spans[0].requests(in_trace(bytes.fromhex(traced)), 1)
    assert collector.named("call quiet") == []
    assert await engine_spans[0].requests(in_trace(bytes.fromhex(untraced)), 0) == []
