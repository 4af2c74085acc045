"""Every name of vLLM that the scheduler relies on, checked once, when the engine starts.

vLLM's scheduler is not a public interface. What is missing is reported here, by name and
version, before the first request; past that point nothing is looked up that may not be there.

| vLLM            | second waiting queue                       | hook for prefill chunks      |
|-----------------|--------------------------------------------|------------------------------|
| 0.27.1          | `skipped_waiting`                          | none                         |
| 0.28 ... 0.30   | `skipped_waiting`                          | `_reserve_prefill_lookahead` |
| 0.31 ... 0.33   | `kv_holding_waiting`, `deferred_waiting`   | `_reserve_prefill_lookahead` |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.version import __version__ as vllm_version

from vllm_workflow.core.errors import ConfigError

SUPPORTED = "0.27.1 to 0.33"

_METHODS = (
    "add_request",
    "schedule",
    "shutdown",
    "update_from_output",
    "_free_blocks",
    "_preempt_request",
    "_update_request_as_session",
)
_ATTRIBUTES = (
    "block_size",
    "kv_cache_config",
    "kv_cache_manager",
    "max_num_running_reqs",
    "max_num_scheduled_tokens",
    "num_waiting_for_streaming_input",
    "policy",
    "prev_step_scheduled_req_ids",
    "requests",
    "running",
    "scheduler_config",
    "waiting",
    "_pause_state",
)
_REQUEST = (
    "arrival_time",
    "drop_stale_output",
    "has_encoder_inputs",
    "num_computed_tokens",
    "num_prompt_tokens",
    "num_stale_output_tokens",
    "num_tokens",
    "priority",
    "request_id",
    "sampling_params",
    "status",
)
_STATUSES = ("WAITING", "PREEMPTED", "FINISHED_ABORTED", "FINISHED_ERROR")
_OUTPUTS = (
    (SchedulerOutput, "scheduled_new_reqs"),
    (SchedulerOutput, "scheduled_cached_reqs"),
    (SchedulerOutput, "num_scheduled_tokens"),
    (SchedulerOutput, "scheduled_spec_decode_tokens"),
    (SchedulerOutput, "total_num_scheduled_tokens"),
    (NewRequestData, "req_id"),
    (CachedRequestData, "resumed_req_ids"),
)
_SECOND_QUEUES = ("kv_holding_waiting", "skipped_waiting")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmShape:
    """How the installed vLLM differs from its neighbours."""

    queues: tuple[str, ...]
    """Attributes of a scheduler that hold waiting requests."""
    has_prefill_hook: bool
    """A scheduler asks `_reserve_prefill_lookahead` for the size of each prefill chunk."""


def check_class(scheduler: type) -> None:
    """Check what must be there before a scheduler is built.

    Raises:
        ConfigError: A name is missing; the one line says which, and where.
    """
    for name in _METHODS:
        _require(_vllm_method(scheduler, name) is not None, f"Scheduler.{name}")
    preempt = _vllm_method(scheduler, "_preempt_request")
    _require(
        "drop_stale_output" in inspect.signature(preempt).parameters,  # type: ignore[arg-type]
        "Scheduler._preempt_request(drop_stale_output=...)",
    )
    for name in _STATUSES:
        _require(hasattr(RequestStatus, name), f"RequestStatus.{name}")
    for output, name in _OUTPUTS:
        _require(name in output.__dataclass_fields__, f"{output.__name__}.{name}")
    # Instance attributes are known before there is an instance by what __init__ stores.
    stored = {*dir(Request), *Request.__init__.__code__.co_names}
    for name in _REQUEST:
        _require(name in stored, f"Request.{name}")


def check_instance(scheduler: Any) -> VllmShape:
    """Check what a scheduler has once it is built, and say what shape it has.

    Raises:
        ConfigError: A name is missing; the one line says which, and where.
    """
    for name in _ATTRIBUTES:
        _require(hasattr(scheduler, name), f"Scheduler.{name}")
    pool = getattr(scheduler.kv_cache_manager, "block_pool", None)
    _require(hasattr(pool, "get_num_free_blocks"), "KVCacheManager.block_pool.get_num_free_blocks")
    for name in ("enable_caching", "get_blocks"):
        _require(hasattr(scheduler.kv_cache_manager, name), f"KVCacheManager.{name}")
    second = [name for name in _SECOND_QUEUES if hasattr(scheduler, name)]
    _require(bool(second), f"Scheduler.{_SECOND_QUEUES[0]}")
    return VllmShape(
        queues=("waiting", second[0]),
        has_prefill_hook=_vllm_method(type(scheduler), "_reserve_prefill_lookahead") is not None,
    )


def check_model(vllm_config: Any) -> None:
    """Refuse models that need a scheduler of their own.

    Raises:
        ConfigError: The model is a diffusion model.
    """
    if getattr(vllm_config.model_config, "is_diffusion", False):
        raise ConfigError(
            "--scheduler workflow: diffusion models need vLLM's own scheduler; start without it"
        )


def _vllm_method(scheduler: type, name: str) -> Callable[..., Any] | None:
    """What vLLM itself defines, whatever this package overrides."""
    for cls in scheduler.__mro__:
        if not cls.__module__.startswith("vllm_workflow.") and name in vars(cls):
            return vars(cls)[name]
    return None


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ConfigError(
            f"--scheduler workflow: vLLM {vllm_version} has no {name}; vllm-workflow supports "
            f"vLLM {SUPPORTED}; start without --scheduler, or with another vLLM"
        )
