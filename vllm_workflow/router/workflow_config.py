"""The `workflows` of `router.yaml`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from vllm_workflow.core.workflow import StageProfile, WorkflowProfile
from vllm_workflow.yaml_config import Name, Strict


class StageConfig(Strict):
    """One stage, means over runs, see `core.workflow.StageProfile`."""

    name: Name
    rounds: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    prompt_tokens: Annotated[int, Field(ge=0, le=10**9)] = 256
    output_tokens: Annotated[float, Field(ge=0, le=1e9)] = 64.0


class WorkflowConfig(Strict):
    """A workflow as its author declares it; stages in the order in which they start."""

    name: Name
    stages: list[StageConfig]

    def build(self) -> WorkflowProfile:
        stages = tuple(StageProfile(**s.model_dump()) for s in self.stages)
        return WorkflowProfile(name=self.name, stages=stages)

    @model_validator(mode="after")
    def _check(self) -> WorkflowConfig:
        self.build()
        return self
