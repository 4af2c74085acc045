"""How calls say which run they belong to, in the words of whoever is to understand them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vllm_workflow.sim.types import TraceCall, TraceRun

_MAX_LABEL_LENGTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """A call about to be sent."""

    run: TraceRun
    call: TraceCall
    workflow_id: str
    """The run's name at the server."""
    slo_s: float | None = None
    """The run's SLO by the wall clock."""
    budget_s: float | None = None
    """What is left of it now; None without one."""
    final: bool = False
    """Whether an agent would know that it is the run's last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which of the ways to tell the server about runs are used; none makes ordinary calls."""

    headers: bool = True
    """`X-Workflow-*`, for this project's router."""
    xargs: bool = False
    """`vllm_xargs.wf_*`, for a vLLM server with this project's scheduler and no router."""
    agentic_context: bool = False
    """`vllm_xargs.agentic_context`, for vllm-router's program scheduling. vLLM itself refuses
    calls that carry it."""
    session: bool = False
    """`X-Session-ID`, which other routers take for what belongs together."""

    def to_headers(self, context: CallContext) -> dict[str, str]:
        """Return the request headers of a call."""
        said = {"X-Request-Id": f"{context.workflow_id}-{label(context.call.call_id)}"}
        if self.session:
            said["X-Session-ID"] = context.workflow_id
        if not self.headers:
            return said
        said |= {
            "X-Workflow-Id": context.workflow_id,
            "X-Workflow-Name": label(context.run.workflow),
            "X-Workflow-Stage": label(context.call.stage),
        }
        if context.slo_s is not None and context.budget_s is not None:
            said["X-Workflow-Slo-Ms"] = str(max(1, round(1000 * context.slo_s)))
            said["X-Workflow-Budget-Ms"] = str(_milliseconds(context.budget_s))
        if context.final:
            said["X-Workflow-Final"] = "true"
        if context.run.tenant:
            said["X-Tenant-Id"] = label(context.run.tenant)
        return said

    def to_xargs(self, context: CallContext) -> dict[str, Any]:
        """Return what goes into the body's `vllm_xargs`."""
        said: dict[str, Any] = {}
        if self.xargs:
            said |= {
                "wf_id": context.workflow_id,
                "wf_name": label(context.run.workflow),
                "wf_stage": label(context.call.stage),
            }
            if context.budget_s is not None:
                said["wf_budget_ms"] = _milliseconds(context.budget_s)
            if context.final:
                said["wf_final"] = "true"
            if context.run.tenant:
                said["wf_tenant"] = label(context.run.tenant)
        if self.agentic_context:
            said["agentic_context"] = self._agentic_context(context)
        return said

    def _agentic_context(self, context: CallContext) -> dict[str, Any]:
        said: dict[str, Any] = {
            "program_id": context.workflow_id,
            "task_id": f"{context.workflow_id}-{label(context.call.call_id)}",
            "step_id": label(context.call.stage),
        }
        if context.budget_s is not None:
            said["deadline_seconds"] = _milliseconds(context.budget_s) / 1000
        return said


def label(name: str) -> str:
    """Return a name as it can stand in a header: printable ASCII, not too long, never empty."""
    return quote(name, safe=" ~:/@+,;=()[]{}<>|#!$&'*?^`%\"\\")[:_MAX_LABEL_LENGTH].strip() or "-"


def _milliseconds(budget_s: float) -> int:
    return max(0, int(1000 * budget_s))
