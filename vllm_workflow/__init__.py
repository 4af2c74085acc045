"""End-to-end deadlines for multi-stage LLM workflows on vLLM."""

from vllm_workflow.client import attach, stage, workflow
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import WorkflowError
from vllm_workflow.core.types import Candidate, Decision, Outcome, StageRequest

__all__ = [
    "Candidate",
    "Decision",
    "Outcome",
    "PolicyConfig",
    "StageRequest",
    "WorkflowError",
    "attach",
    "stage",
    "workflow",
]
