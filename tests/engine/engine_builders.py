"""Real vLLM schedulers and requests, with a default for everything."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_workflow.engine.scheduler import WorkflowScheduler

BLOCK_SIZE = 16
init_none_hash(sha256)
_block_hasher = get_request_block_hasher(BLOCK_SIZE, sha256)


def write_config(path: Path) -> Path:
    """Make a directory a model without weights; the configuration is all that is read."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 128,
        "max_position_embeddings": 8192,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def build_scheduler(
    model_dir: Path,
    *,
    cls: Any = WorkflowScheduler,
    policy: Any = None,
    num_seats: int = 2,
    num_blocks: int = 1000,
    max_num_batched_tokens: int = 8192,
    asynchronous: bool = False,
    scheduling_policy: str = "fcfs",
    prefix_caching: bool = False,
    clock: Any = None,
    additional_config: dict[str, Any] | None = None,
) -> Any:
    if policy is not None:
        additional_config = {"workflow": {"policy": policy}}
    vllm_config = VllmConfig(
        model_config=ModelConfig(model=str(model_dir), skip_tokenizer_init=True, dtype="float32"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=num_seats,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=8192,
            is_encoder_decoder=False,
            async_scheduling=asynchronous,
            policy=scheduling_policy,
            watermark=0.0,
        ),
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=prefix_caching),
        parallel_config=ParallelConfig(),
        additional_config=additional_config or {},
    )
    # VllmConfig decides on asynchronous scheduling by platform; the test decides here.
    vllm_config.scheduler_config.async_scheduling = asynchronous
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return cls(
        **({} if clock is None else {"clock": clock}),
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        block_size=BLOCK_SIZE,
        log_stats=True,
        structured_output_manager=StructuredOutputManager(vllm_config),
    )


def build_request(
    request_id: str,
    *,
    num_tokens: int = 16,
    token_id: int = 1,
    max_tokens: int = 64,
    arrival_time: float | None = None,
    priority: int = 0,
    extra_args: Any = None,
    session_id: str | None = None,
    resumable: bool = False,
    **wf: Any,
) -> Request:
    """A request; keyword arguments that start with `wf_` are its metadata."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    params.extra_args = extra_args if extra_args is not None else (wf or None)
    request = Request(
        request_id=request_id,
        prompt_token_ids=[token_id] * num_tokens,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time() if arrival_time is None else arrival_time,
        priority=priority,
        session_id=session_id,
        resumable=resumable,
        block_hasher=_block_hasher,
    )
    return request


def run_step(scheduler: Any) -> Any:
    """One engine step: every request that is not within its prompt gets a token."""
    output = scheduler.schedule()
    request_ids = list(output.num_scheduled_tokens)
    tokens = [[] if scheduler.requests[r].is_prefill_chunk else [7] for r in request_ids]
    scheduler.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={r: i for i, r in enumerate(request_ids)},
            sampled_token_ids=tokens,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        ),
    )
    return output


def ids(requests: Any) -> list[str]:
    return [request.request_id for request in requests]


def add(scheduler: Any, *requests: Any) -> None:
    for request in requests:
        scheduler.add_request(request)


def fill_seats(scheduler: Any, num_seats: int = 2, **wf: Any) -> list[Any]:
    """Have so many calls running, by default with a minute of slack."""
    wf = wf or {"wf_budget_ms": 60_000}
    batch = [build_request(f"batch-{i}", **wf) for i in range(num_seats)]
    add(scheduler, *batch)
    run_step(scheduler)
    assert ids(scheduler.running) == ids(batch)
    return batch
