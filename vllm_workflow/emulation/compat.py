"""Every name of vLLM that the emulated GPU relies on, checked once, when the engine starts.

Neither workers nor platforms of vLLM are a frozen interface. Tried as a server: vLLM 0.32 on a
CPU. Of other versions, what is missing is reported here by name, before the first request.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from vllm import exceptions
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker import worker_base
from vllm.version import __version__ as vllm_version

from vllm_workflow.core.errors import ConfigError

TRIED = "0.32"

_FIELDS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (
        SchedulerOutput,
        (
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_cached_reqs",
            "scheduled_new_reqs",
            "total_num_scheduled_tokens",
        ),
    ),
    (
        NewRequestData,
        (
            "num_computed_tokens",
            "prefill_token_ids",
            "prompt_embeds",
            "prompt_token_ids",
            "req_id",
            "sampling_params",
        ),
    ),
    (
        CachedRequestData,
        ("num_computed_tokens", "num_output_tokens", "req_ids", "resumed_req_ids"),
    ),
    (GrammarOutput, ("grammar_bitmask", "structured_output_request_ids")),
    (ModelRunnerOutput, ("req_id_to_index", "req_ids", "sampled_token_ids")),
    (FullAttentionSpec, ("block_size", "dtype", "head_size", "num_kv_heads")),
)
_NAMES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        SamplingParams,
        (
            "eos_token_id",
            "extra_args",
            "ignore_eos",
            "logprobs",
            "min_tokens",
            "prompt_logprobs",
            "stop_token_ids",
        ),
    ),
    (
        worker_base.WorkerBase,
        (
            "compile_or_warm_up_model",
            "execute_model",
            "get_kv_cache_spec",
            "init_device",
            "load_model",
            "sample_tokens",
            "shutdown",
        ),
    ),
    (worker_base, ("CompilationTimes",)),
    (AsyncModelRunnerOutput, ("get_output",)),
    (exceptions, ("VLLMValidationError",)),
    (PlatformEnum, ("OOT",)),
    (
        Platform,
        (
            "check_and_update_config",
            "get_device_name",
            "get_device_total_memory",
            "pre_register_and_update",
            "validate_request",
        ),
    ),
)
_WORKER_ARGUMENTS = ("vllm_config", "local_rank", "rank", "distributed_init_method")


def check() -> None:
    """Check that everything is there.

    Raises:
        ConfigError: A name is missing; the one line says which, and where.
    """
    for cls, names in _FIELDS:
        known = {f.name for f in dataclasses.fields(cls)}
        for name in names:
            _require(name in known, f"{cls.__name__}.{name}")
    for owner, names in _NAMES:
        for name in names:
            _require(hasattr(owner, name), f"{owner.__name__}.{name}")
    arguments = inspect.signature(worker_base.WorkerBase.__init__).parameters
    for name in _WORKER_ARGUMENTS:
        _require(name in arguments, f"WorkerBase({name}=...)")


def check_config(vllm_config: Any) -> None:
    """Refuse what no emulation is there for.

    Raises:
        ConfigError: The flag, and what to do instead.
    """
    parallel = vllm_config.parallel_config
    for flag, is_used, instead in (
        (
            "--tensor-parallel-size",
            parallel.tensor_parallel_size > 1,
            "--emulate-tp emulates several GPUs in one process",
        ),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1, "it must be 1"),
        ("--speculative-config", vllm_config.speculative_config is not None, "leave it away"),
        ("--enable-lora", vllm_config.lora_config is not None, "leave it away"),
        ("--kv-transfer-config", vllm_config.kv_transfer_config is not None, "leave it away"),
        (
            "--runner",
            vllm_config.model_config is not None
            and vllm_config.model_config.runner_type != "generate",
            "only generation is emulated",
        ),
    ):
        if is_used:
            raise ConfigError(f"--emulate-gpu: {flag} cannot be emulated; {instead}")


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ConfigError(
            f"--emulate-gpu: vLLM {vllm_version} has no {name}; the emulated GPU was tried with "
            f"vLLM {TRIED}; use that version"
        )
