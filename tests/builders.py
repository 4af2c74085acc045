"""Values for tests, with a default for every field that a test is not about."""

from __future__ import annotations

import math

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.events import Record
from vllm_workflow.core.fleet import Fleet, Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.prefix import Chain
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.core.types import Candidate, Outcome, StageRequest
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile

FAST = LatencyModel(overhead_s=0.001, weights_s=0.004, per_token_s=2e-5)
SLOW = LatencyModel(overhead_s=0.002, weights_s=0.016, per_token_s=8e-5)


def stage_request(
    request_id: str = "r",
    *,
    arrival_time: float = 0.0,
    deadline: float = math.inf,
    run_arrival_time: float = math.nan,
    rest_s: float = 0.0,
    service_s: float = 0.0,
    attained_s: float = 0.0,
    attained_path_s: float = 0.0,
    workflow_id: str = "",
    tenant_id: str = "",
    workflow: str = "",
    stage: str = "",
    model: str = "",
    priority: int = 0,
    num_prompt_tokens: int = 100,
    expected_output_tokens: float = 10.0,
    prefix: Chain = (),
    final: bool = False,
) -> StageRequest:
    return StageRequest(
        request_id=request_id,
        arrival_time=arrival_time,
        deadline=deadline,
        run_arrival_time=run_arrival_time,
        rest_s=rest_s,
        service_s=service_s,
        attained_s=attained_s,
        attained_path_s=attained_path_s,
        workflow_id=workflow_id,
        tenant_id=tenant_id,
        workflow=workflow,
        stage=stage,
        model=model,
        priority=priority,
        num_prompt_tokens=num_prompt_tokens,
        expected_output_tokens=expected_output_tokens,
        prefix=prefix,
        final=final,
    )


def candidate(
    instance_id: str,
    *,
    queue_s: float = 0.0,
    prefill_s: float = 0.5,
    decode_s: float = 0.0,
    harm_s: float = 0.0,
    num_outstanding: int = 0,
    outstanding_s: float = 0.0,
) -> Candidate:
    return Candidate(
        instance_id=instance_id,
        queue_s=queue_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        harm_s=harm_s,
        num_outstanding=num_outstanding,
        outstanding_s=outstanding_s,
    )


def instance(
    instance_id: str,
    *,
    models: tuple[str, ...] = (),
    latency: LatencyModel = FAST,
    max_num_seqs: int = 128,
    num_kv_tokens: int | None = None,
) -> Instance:
    return Instance(
        instance_id=instance_id,
        models=models,
        latency=latency,
        max_num_seqs=max_num_seqs,
        num_kv_tokens=num_kv_tokens,
    )


def fleet(*instances: Instance) -> Fleet:
    result = Fleet()
    for each in instances or (instance("a"), instance("b", latency=SLOW)):
        result.add(each)
    return result


def dispatcher(
    *instances: Instance,
    config: PolicyConfig | None = None,
    workflows: tuple[WorkflowProfile, ...] = (),
    record: Record | None = None,
    tenants: TenantsConfig | None = None,
) -> Dispatcher:
    return Dispatcher(fleet(*instances), config or PolicyConfig(), workflows, record, tenants)


def workflow(name: str = "text2sql", **rounds_of_stage: float) -> WorkflowProfile:
    stages = tuple(StageProfile(name=s, rounds=r) for s, r in rounds_of_stage.items())
    return WorkflowProfile(name=name, stages=stages)


def outcome(
    request_id: str,
    instance_id: str,
    *,
    ok: bool = True,
    e2el_s: float = 1.0,
    num_prompt_tokens: int | None = None,
    num_cached_tokens: int | None = None,
    num_output_tokens: int | None = None,
) -> Outcome:
    return Outcome(
        request_id=request_id,
        instance_id=instance_id,
        ok=ok,
        e2el_s=e2el_s if ok else math.nan,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=num_output_tokens,
    )
