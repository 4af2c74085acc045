"""vLLM's scheduler with nothing around it: no server, no worker, no weights, no tokenizer."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.structured_output import StructuredOutputManager

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.engine.clock import Clock
from vllm_workflow.engine.scheduler import WorkflowScheduler
from vllm_workflow.sim.vllm_server import VllmServer


def build_scheduler(instance_id: str, server: VllmServer, clock: Clock) -> Any:
    """Build the scheduler that `vllm serve` would, for a model that has no weights.

    Raises:
        ConfigError: vLLM refuses the configuration.
    """
    with _quiet(), tempfile.TemporaryDirectory() as directory:
        try:
            vllm_config = _vllm_config(server, Path(directory))
        except ValueError as e:  # pydantic's are of this kind
            raise ConfigError(f"{instance_id}: vLLM refuses the configuration: {e}") from e
        spec = FullAttentionSpec(
            block_size=server.block_size,
            num_kv_heads=1,
            head_size=1,
            dtype=vllm_config.model_config.dtype,
        )
        arguments: dict[str, Any] = {
            "vllm_config": vllm_config,
            "kv_cache_config": KVCacheConfig(
                num_blocks=server.num_kv_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            "block_size": server.block_size,
            "structured_output_manager": StructuredOutputManager(vllm_config),
            "log_stats": False,  # else metrics would be published, and events stamped with time
        }
        if server.policy is not None:
            return WorkflowScheduler(**arguments, clock=clock)
        return (AsyncScheduler if server.async_scheduling else Scheduler)(**arguments)


def _vllm_config(server: VllmServer, directory: Path) -> VllmConfig:
    """The configuration of a server of a smallest Llama, of which only the length matters."""
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 128,
        "max_position_embeddings": server.max_model_len,
    }
    (directory / "config.json").write_text(json.dumps(model), encoding="utf-8")
    settings = {} if server.policy is None else {"workflow": {"policy": asdict(server.policy)}}
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(directory),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=server.max_model_len,
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=server.max_num_seqs,
            max_num_batched_tokens=server.max_num_batched_tokens,
            max_model_len=server.max_model_len,
            is_encoder_decoder=False,
            policy=server.scheduling_policy,
        ),
        cache_config=CacheConfig(block_size=server.block_size, enable_prefix_caching=True),
        parallel_config=ParallelConfig(),
        additional_config=settings,
    )
    # vLLM decides on asynchronous scheduling by the platform of this process.
    config.scheduler_config.async_scheduling = server.async_scheduling
    config.cache_config.num_gpu_blocks = server.num_kv_blocks
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence vLLM's advice on serving from this machine, where nothing is served."""
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
