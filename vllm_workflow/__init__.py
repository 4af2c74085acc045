"""End-to-end deadlines for multi-stage LLM workflows on vLLM."""

from vllm_workflow.client import attach, copy_context, stage, workflow
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import OverloadedError, WorkflowError
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest

__all__ = [
    "Candidate",
    "Decision",
    "Outcome",
    "OverloadedError",
    "PolicyConfig",
    "StageRequest",
    "WorkflowError",
    "attach",
    "copy_context",
    "stage",
    "workflow",
]
