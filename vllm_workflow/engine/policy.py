"""Which policy an engine runs, and where that was said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError

POLICY_ENV = "VLLM_WORKFLOW_POLICY"
"""Path of a `policy.json`, the name of a preset, or `DISPATCH+ORDERING`."""

_CONFIG = "--additional-config: workflow"


def load_policy(vllm_config: Any) -> PolicyConfig:
    """The policy of `--additional-config '{"workflow": {"policy": …}}'`, else of the environment.

    Without either, the default policy.

    Raises:
        ConfigError: What was named cannot be read, or does not fit.
    """
    config = getattr(vllm_config, "additional_config", None)
    settings = config.get("workflow") if isinstance(config, Mapping) else None
    if settings is None:
        return policy_of_environment()
    if not isinstance(settings, Mapping):
        raise ConfigError(f'{_CONFIG}: expected {{"policy": …}}, got {settings!r}')
    unknown = sorted(set(settings) - {"policy"})
    if unknown:
        raise ConfigError(f"{_CONFIG}: unknown field {unknown[0]!r}; known fields are ['policy']")
    if "policy" not in settings:
        return policy_of_environment()
    return _policy(settings["policy"], source=f"{_CONFIG}: policy")


def policy_of_environment() -> PolicyConfig:
    """The policy that `VLLM_WORKFLOW_POLICY` names; the default policy if it is not set.

    Raises:
        ConfigError: What it names cannot be read, or does not fit.
    """
    value = os.environ.get(POLICY_ENV)
    return _policy(value, source=POLICY_ENV) if value else PolicyConfig()


def _policy(value: object, *, source: str) -> PolicyConfig:
    """A mapping is the policy itself, a word its name, anything else a path."""
    if isinstance(value, str) and ("." in value or os.sep in value):
        try:
            return PolicyConfig.from_file(value)
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from None
    return PolicyConfig.from_mapping(value, source=source)
