"""From what a client sent to what a policy sees.

A request carries its workflow metadata as flat scalars in `vllm_xargs`, which vLLM hands to the
engine as `sampling_params.extra_args`:

| key             | type | meaning                                                              |
|-----------------|------|----------------------------------------------------------------------|
| `wf_id`         | text | the run that this call belongs to; `session_id` stands in if absent  |
| `wf_name`       | text | kind of the run                                                      |
| `wf_stage`      | text | named step of the run                                                |
| `wf_tenant`     | text | who the run is billed to                                             |
| `wf_budget_ms`  | number | what is left of the run's budget; 0 or less: the run is late already |
| `wf_rest_ms`    | number | predicted work of the run after this call                            |
| `wf_service_ms` | number | predicted duration of this call                                      |
| `wf_age_ms`     | number | since the run's first call                                           |
| `wf_attained_ms` | number | service that the run's finished calls have had, summed              |
| `wf_attained_path_ms` | number | the same along the longest path of calls                       |
| `wf_final`      | 0 or 1 | this is the run's last call                                          |

Only durations travel. `arrival_time` is `time.time()` in the API process, so every instant in the
engine is on that clock too. A step of the clock shifts the slack of the calls that are then in
flight by as much, and nothing else.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from vllm_workflow.core.types import StageRequest

MAX_TEXT_LENGTH = 256
"""Characters kept of an identifier; memory per request stays bounded whatever is sent."""
MAX_NUMBER_LENGTH = 32
"""Characters of a number sent as a string, as OpenAI's `metadata` has them."""
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
MAX_DURATION_S = 1e7
"""About four months. A longer budget is no deadline at all."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What could be read of one request."""

    call: StageRequest
    is_workflow: bool
    """At least one `wf_*` key was readable."""
    num_unreadable: int
    """`wf_*` keys that were there and made no sense; each was read as if absent."""


def read(request: Any) -> Reading:
    """Read the workflow metadata of a vLLM `Request`. Never raises, whatever a client sent."""
    extra_args = _extra_args(request)
    fields = _Fields(extra_args)
    arrival_time = _arrival_time(request)
    call = StageRequest(
        request_id=str(getattr(request, "request_id", "")),
        arrival_time=arrival_time,
        workflow_id=fields.text("wf_id") or _session_id(request, extra_args),
        workflow=fields.text("wf_name"),
        stage=fields.text("wf_stage"),
        tenant_id=fields.text("wf_tenant"),
        priority=_int(getattr(request, "priority", 0), default=0),
        deadline=arrival_time + fields.budget_s("wf_budget_ms"),
        run_arrival_time=arrival_time - fields.duration_s("wf_age_ms", absent=math.nan),
        rest_s=fields.duration_s("wf_rest_ms"),
        service_s=fields.duration_s("wf_service_ms"),
        attained_s=fields.duration_s("wf_attained_ms"),
        attained_path_s=fields.duration_s("wf_attained_path_ms"),
        num_prompt_tokens=max(1, _int(getattr(request, "num_prompt_tokens", 1), default=1)),
        final=fields.flag("wf_final"),
    )
    return Reading(call, fields.num_read > 0, fields.num_unreadable)


def has_extra_args(request: Any) -> bool:
    """Whether there is anything to read at all."""
    return bool(_extra_args(request))


class _Fields:
    """Typed look-ups in untrusted values, which count what they read and what they could not.

    Exact types are compared, so that no code of a value's class ever runs.
    """

    __slots__ = ("_values", "num_read", "num_unreadable")

    def __init__(self, values: dict[Any, Any]) -> None:
        self._values = values
        self.num_read = 0
        self.num_unreadable = 0

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if type(value) is int and abs(value) < 2**64:
            value = str(value)
        if type(value) is str and value:
            self.num_read += 1
            return value[:MAX_TEXT_LENGTH]
        self._skip(name)
        return ""

    def duration_s(self, name: str, *, absent: float = 0.0) -> float:
        """Milliseconds as seconds; `absent` if absent, negative or absurd."""
        value = self._number(name)
        if value is not None and 0 <= value <= MAX_DURATION_S * 1e3:
            self.num_read += 1
            return float(value) / 1e3
        self._skip(name)
        return absent

    def budget_s(self, name: str) -> float:
        """Milliseconds as seconds; `inf` if absent or absurd. Less than nothing stays late."""
        value = self._number(name)
        if value is not None and value <= MAX_DURATION_S * 1e3:
            self.num_read += 1
            return float(max(value, -MAX_DURATION_S * 1e3)) / 1e3
        self._skip(name)
        return math.inf

    def flag(self, name: str) -> bool:
        value = self._values.get(name)
        if type(value) is str:
            value = _FLAGS.get(value.lower())
        if type(value) in (bool, int, float) and value in (0, 1):
            self.num_read += 1
            return bool(value)
        self._skip(name)
        return False

    def _number(self, name: str) -> int | float | None:
        value = self._values.get(name)
        if type(value) is str and len(value) <= MAX_NUMBER_LENGTH and "_" not in value:
            try:
                value = float(value)
            except ValueError:
                return None
        if type(value) is int:
            return value
        if type(value) is float and math.isfinite(value):
            return value
        return None

    def _skip(self, name: str) -> None:
        if self._values.get(name) is not None:
            self.num_unreadable += 1


def _extra_args(request: Any) -> dict[Any, Any]:
    """The client's scalars; pooling requests and requests without any have none."""
    values = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    return values if type(values) is dict else {}


def _session_id(request: Any, extra_args: dict[Any, Any]) -> str:
    """Conversation as vLLM knows it, by header or body field, or named in xargs."""
    value = getattr(request, "session_id", None)
    if type(value) is str:
        return value[:MAX_TEXT_LENGTH]
    return _Fields(extra_args).text("session_id")


def _arrival_time(request: Any) -> float:
    value = getattr(request, "arrival_time", None)
    if (type(value) is int or type(value) is float) and abs(value) < 1e12:  # false for nan
        return float(value)
    return time.time()


def _int(value: object, *, default: int) -> int:
    return value if type(value) is int else default
