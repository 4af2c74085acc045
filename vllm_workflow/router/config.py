"""`router.yaml`: read, checked, and turned into values of the core."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_workflow.core.config import DEFAULT_POLICY, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.router.workflow_config import WorkflowConfig
from vllm_workflow.yaml_config import Strict, read_yaml, validated


class RouterConfig(Strict):
    """Everything in `router.yaml`."""

    instances: Annotated[list[InstanceConfig], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes a free one."""
    policy: str | dict[str, Any] = DEFAULT_POLICY
    """A preset, `DISPATCH+ORDERING`, the path of a `policy.json`, or the fields of a policy."""
    workflows: list[WorkflowConfig] = Field(default_factory=list)
    max_body_mb: Annotated[float, Field(gt=0, le=4096)] = 64.0
    """A larger request is answered with 413."""
    set_priority: bool = False
    """Add `priority` to each body, for servers with `--scheduling-policy priority`."""
    decision_log: str | None = None
    """File that every decision is appended to, as JSON lines."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long calls under way may take to end when the router is told to stop."""

    @model_validator(mode="after")
    def _unique(self) -> RouterConfig:
        for kind, names in (
            ("instances", [i.id for i in self.instances]),
            ("workflows", [w.name for w in self.workflows]),
        ):
            if twice := {n for n in names if names.count(n) > 1}:
                raise ValueError(f"{kind}: declared twice: {sorted(twice)}")
        return self

    def policy_config(self) -> PolicyConfig:
        """Return the policy; reads `policy.json` if the configuration names one.

        Raises:
            ConfigError: Unknown name, or a file that cannot be used.
        """
        if isinstance(self.policy, str) and _is_path(self.policy):
            return PolicyConfig.from_file(self.policy)
        return PolicyConfig.from_mapping(self.policy, source="policy")

    @classmethod
    def from_mapping(cls, data: object, *, source: str) -> RouterConfig:
        """Check what YAML gave.

        Raises:
            ConfigError: With the path to each field that does not fit.
        """
        config = validated(cls, data, source=source)
        try:
            config.policy_config()
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from None
        return config

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> RouterConfig:
        """Read `router.yaml`; paths in it are relative to its folder.

        Args:
            path: The file.
            overrides: Fields that replace those of the file.

        Raises:
            ConfigError: The file cannot be read, is not YAML, or does not fit.
        """
        data = read_yaml(path)
        if isinstance(data, dict):
            if isinstance(data.get("decision_log"), str):
                data["decision_log"] = str(path.parent / data["decision_log"])
            if isinstance(data.get("policy"), str) and _is_path(data["policy"]):
                data["policy"] = str(path.parent / data["policy"])
            for instance in data.get("instances") or ():
                if isinstance(instance, dict) and isinstance(instance.get("profile"), str):
                    instance["profile"] = str(path.parent / instance["profile"])
            data |= overrides or {}
        return cls.from_mapping(data, source=str(path))


def _is_path(policy: str) -> bool:
    return policy.endswith(".json") or "/" in policy
