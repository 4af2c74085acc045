"""What one tenant has had of the fleet, and when its quotas have room again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from vllm_workflow.core.tenants import TenantConfig
from vllm_workflow.core.types import StageRequest

RUN_IDLE_S: Final = 60.0
"""A run without a call at an instance for this long is no longer counted as under way."""
ROUNDING: Final = 1e-9


@dataclass(slots=True)
class RunInFlight:
    """A run of a tenant that counts as under way, or did until lately."""

    num_in_flight: int = 0
    over_at: float = math.inf
    """Instant from which it no longer counts; `inf` while a call of it is in flight."""
    is_final: bool = False
    """Whether it is over as soon as none of its calls is in flight."""


@dataclass(slots=True)
class TenantAccount:
    """One tenant's."""

    config: TenantConfig
    virtual_time: float = 0.0
    """Seconds of service per weight."""
    num_waiting: int = 0
    waiting_tokens: float = 0.0
    demand_s: float = 0.0
    """Predicted service of its calls that wait and of those in flight."""
    num_in_flight: int = 0
    runs: dict[str, RunInFlight] = field(default_factory=dict)
    spent_tokens: float = 0.0
    """What its bucket lacked to be full at `spent_at`."""
    spent_at: float = 0.0

    @property
    def is_active(self) -> bool:
        return self.num_waiting > 0 or self.num_in_flight > 0

    def missing_tokens(self, now: float) -> float:
        """What its bucket lacks to be full."""
        rate = self.config.token_rate
        if rate is None:
            return 0.0
        return max(0.0, self.spent_tokens - rate * max(0.0, now - self.spent_at))

    def spend(self, num_tokens: float, now: float) -> None:
        self.spent_tokens = self.missing_tokens(now) + num_tokens
        self.spent_at = max(now, self.spent_at)

    def runs_under_way(self, now: float) -> list[str]:
        return [key for key, run in self.runs.items() if run.over_at > now]

    def end_idle_runs(self, now: float) -> None:
        for over in [i for i, run in self.runs.items() if run.over_at <= now]:
            del self.runs[over]

    def ready_time(self, request: StageRequest, now: float) -> tuple[float, str]:
        """When a call may be sent as far as quotas go, and which of them holds it until then.

        `inf` means: not before another call has ended.
        """
        config = self.config
        if config.max_concurrent_calls is not None and (
            self.num_in_flight >= config.max_concurrent_calls
        ):
            return math.inf, "calls"
        if config.max_concurrent_runs is not None:
            time = self._run_time(request, config.max_concurrent_runs, now)
            if time > now:
                return time, "runs"
        if config.token_rate is not None:
            burst = config.token_burst
            excess = self.missing_tokens(now) + min(num_tokens(request), burst) - burst
            if excess > ROUNDING * burst:
                return now + excess / config.token_rate, "tokens"
        return now, ""

    def _run_time(self, request: StageRequest, most: int, now: float) -> float:
        if len(self.runs) < most:
            return now
        known = self.runs.get(run_key(request))
        if known is not None and known.over_at > now:
            return now
        ends = sorted(run.over_at for run in self.runs.values() if run.over_at > now)
        return now if len(ends) < most else ends[len(ends) - most]


def num_tokens(request: StageRequest) -> float:
    """Tokens of a call as far as they can be predicted: its prompt's and its answer's."""
    return request.num_prompt_tokens + request.expected_output_tokens


def run_key(request: StageRequest) -> str:
    """The run a call belongs to; a call that names none is one of its own."""
    return f"id {request.workflow_id}" if request.workflow_id else f"call {request.request_id}"
