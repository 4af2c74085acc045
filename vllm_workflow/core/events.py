"""What a dispatcher did, as values that can be written down and done again.

One JSON object per line. A number that JSON cannot express (`inf`, `nan`) is left out: it is
the default of every field that may hold it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from vllm_workflow.core.call_events import Polled, Settled, Submitted, Withdrawn
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.prefix import Segment
from vllm_workflow.core.tenants import TenantConfig, TenantsConfig
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest
from vllm_workflow.core.value import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A dispatcher came to be; everything before it belongs to another one."""

    policy: PolicyConfig
    fingerprint: str
    tenants: TenantsConfig | None = None
    """None: nobody asks whose a call is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """From here on another policy decides; calls that wait got their place in its order."""

    now: float
    policy: PolicyConfig
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Apportioned:
    """From here on tenants have other shares, quotas and SLOs."""

    now: float
    tenants: TenantsConfig | None = None
    """None: nobody asks whose a call is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """An instance joined, or came back with other properties."""

    instance: Instance


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """An instance was taken out; the calls in flight on it go on."""

    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """An instance's health became known or changed."""

    instance_id: str
    healthy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """An instance told of calls that somebody else sent."""

    instance_id: str
    num_others: int
    kv_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evicted:
    """An instance told that it caches some pieces of prompts no more."""

    instance_id: str
    chain_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """An instance told that its prefix cache is empty."""

    instance_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What an earlier process had learned of an instance was taken over."""

    instance_id: str
    latency: str
    drift: float
    num_observed: int
    hit_share: float


Event = (
    Started
    | Swapped
    | Apportioned
    | Added
    | Removed
    | Marked
    | Reported
    | Evicted
    | Cleared
    | Restored
    | Submitted
    | Polled
    | Withdrawn
    | Settled
)
Record = Callable[[Event], None]

_EVENTS: Mapping[str, type[Event]] = {
    cls.__name__.lower(): cls
    for cls in (
        *(Started, Swapped, Apportioned, Added, Removed, Marked),
        *(Reported, Evicted, Cleared, Restored),
        *(Submitted, Polled, Withdrawn, Settled),
    )
}
_NESTED: Mapping[str, type[Any]] = {
    "policy": PolicyConfig,
    "instance": Instance,
    "latency": LatencyModel,
    "request": StageRequest,
    "decision": Decision,
    "chosen": Candidate,
    "outcome": Outcome,
    "tenants": TenantsConfig,
    "default": TenantConfig,
}
_ITEMS: Mapping[str, type[Any]] = {
    "candidates": Candidate,
    "decisions": Decision,
    "named": TenantConfig,
}


def to_json(event: Event) -> str:
    """Return one line without its end."""
    return json.dumps({"event": type(event).__name__.lower(), **_fields(event)})


def from_json(line: str | bytes) -> Event:
    """Read back what `to_json` wrote.

    Raises:
        ConfigError: The line is not such an event.
    """
    try:
        data = json.loads(line)
        cls = _EVENTS[data.pop("event")]
        event: Event = _build(cls, data)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"decision log: cannot read line {line!r:.200}: {e!r}") from None
    return event


def _fields(value: Any) -> dict[str, Any]:
    plain = {}
    for name in _names(value):
        item = _plain(getattr(value, name))
        if not (isinstance(item, float) and not math.isfinite(item)):
            plain[name] = item
    return plain


def _names(value: Any) -> Sequence[str]:
    if isinstance(value, Value):
        return value._fields
    return [f.name for f in fields(value) if f.init]


def _plain(value: Any) -> Any:
    if isinstance(value, Segment):
        return [value.chain_hash, value.num_tokens]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return _fields(value) if isinstance(value, Value) or is_dataclass(value) else value


def _build(cls: type[Any], data: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, value in data.items():
        # A policy has a field `policy` too, which holds a name.
        if name in _NESTED and isinstance(value, dict):
            values[name] = _build(_NESTED[name], value)
        elif name in _ITEMS:
            values[name] = tuple(_build(_ITEMS[name], item) for item in value)
        elif name == "prefix":
            values[name] = tuple(Segment(*item) for item in value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
