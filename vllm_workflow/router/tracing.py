"""OpenTelemetry spans: one per run, one per call, handed on so that vLLM's own spans join them.

A call's span is a child of the client's, if the client sent a `traceparent`, else of its run's.
Nothing of a prompt or an answer is in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vllm_workflow.core.call_events import Polled, Submitted
from vllm_workflow.core.events import Event
from vllm_workflow.core.types import Decision
from vllm_workflow.router.call import Call
from vllm_workflow.router.exchange import Answer
from vllm_workflow.router.runs import Run

_PREFIX = "vllm_workflow."
_PROPAGATOR = TraceContextTextMapPropagator()
_CONTEXT = ("traceparent", "tracestate")


class Tracing:
    """Makes spans and sends them to a collector from a thread of its own.

    Args:
        endpoint: URL that takes OTLP over HTTP, e.g. `http://127.0.0.1:4318/v1/traces`.
        sample_ratio: Share of the traces begun here that are kept; a client's own decision wins.
        headers: Sent along, e.g. the collector's key.
    """

    def __init__(
        self, endpoint: str, sample_ratio: float = 1.0, headers: Mapping[str, str] | None = None
    ) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "vllm-workflow-router"}),
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, headers=dict(headers or {}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vllm_workflow.router")
        self._open: dict[str, Span] = {}
        """Spans of the calls under way, by the dispatcher's name for them."""

    def close(self) -> None:
        """Send what is left. Blocks."""
        self._provider.shutdown()

    @contextmanager
    def call(self, call: Call, run: Run) -> Iterator[CallSpan]:
        """Trace one call while the block runs; the headers to forward get its `traceparent`."""
        parent = _PROPAGATOR.extract({name: call.headers.get(name) for name in _CONTEXT})
        has_parent = trace.get_current_span(parent).get_span_context().is_valid
        if call.info.workflow_id and run.span is None:
            run.span = self._tracer.start_span(
                f"run {run.workflow}".rstrip(), context=parent, attributes=_run_attributes(call)
            )
        if not has_parent and isinstance(run.span, Span):
            parent = trace.set_span_in_context(run.span, otel_context.Context())
        span = self._tracer.start_span(
            f"call {call.info.stage}".rstrip(),
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_call_attributes(call),
        )
        own = trace.set_span_in_context(span, otel_context.Context())
        context: dict[str, str] = {}
        _PROPAGATOR.inject(context, own)
        for name in _CONTEXT:
            call.headers.remove(name)
        for name, value in context.items():
            call.headers.set(name, value)
        key = call.request.request_id
        self._open[key] = span
        told = CallSpan(span)
        try:
            yield told
        except BaseException as e:
            span.set_status(Status(StatusCode.ERROR, type(e).__name__))
            raise
        finally:
            del self._open[key]
            span.end()

    def record(self, event: Event) -> None:
        """Note at a call's span where it goes and what was predicted."""
        match event:
            case Submitted(decision=Decision() as decision):
                self._bound(decision)
            case Submitted(request=request):
                if (span := self._open.get(request.request_id)) is not None:
                    span.add_event("waits")
            case Polled(decisions=decisions):
                for decision in decisions:
                    self._bound(decision)

    def run_ended(self, run: Run) -> None:
        """End a run's span."""
        if isinstance(run.span, Span):
            if run.deadline != math.inf:
                run.span.set_attribute(f"{_PREFIX}deadline_met", run.met)
            run.span.end()

    def _bound(self, decision: Decision) -> None:
        span = self._open.get(decision.request_id)
        if span is None:
            return
        attributes: dict[str, Any] = {
            f"{_PREFIX}instance": decision.chosen.instance_id,
            f"{_PREFIX}predicted_s": decision.chosen.finish_s,
            f"{_PREFIX}policy": decision.policy,
        }
        if math.isfinite(decision.slack_s):
            attributes[f"{_PREFIX}slack_s"] = decision.slack_s
        span.add_event("dispatched", attributes)


class CallSpan:
    """What is told of one call at its end."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def answered(self, response: Answer, *, ok: bool) -> None:
        """Note what the client got."""
        self._span.set_attribute("http.response.status_code", response.status)
        if instance := response.headers.get("x-workflow-instance"):
            self._span.set_attribute(f"{_PREFIX}instance", instance)
        if not ok:
            self._span.set_status(Status(StatusCode.ERROR))


def _run_attributes(call: Call) -> dict[str, Any]:
    info = call.info
    named = {"run": info.workflow_id, "workflow": info.workflow, "tenant": info.tenant_id}
    return {f"{_PREFIX}{name}": value for name, value in named.items() if value}


def _call_attributes(call: Call) -> dict[str, Any]:
    request = call.request
    attributes = _run_attributes(call) | {
        f"{_PREFIX}request": call.request_id,
        f"{_PREFIX}stream": call.body.stream,
        f"{_PREFIX}rest_s": request.rest_s,
        "gen_ai.request.model": call.body.model,
    }
    if request.stage:
        attributes[f"{_PREFIX}stage"] = request.stage
    if request.has_deadline:
        attributes[f"{_PREFIX}budget_s"] = request.deadline - request.arrival_time
    return attributes
