"""`router.yaml`: read, checked, and turned into values of the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vllm_workflow.core.config import DEFAULT_POLICY, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.router.access_config import AdminConfig, AuthConfig, TlsConfig
from vllm_workflow.router.config_paths import INSTANCE_FILES, locate
from vllm_workflow.router.discovery_config import DiscoveryConfig
from vllm_workflow.router.instance_config import InstanceConfig, Server
from vllm_workflow.router.limits import LimitsConfig
from vllm_workflow.router.recorder import StoreConfig
from vllm_workflow.router.tracing_config import TracingConfig
from vllm_workflow.router.tuner_config import TunerConfig
from vllm_workflow.router.workflow_config import WorkflowConfig
from vllm_workflow.yaml_config import Strict, read_yaml, validated


class RouterConfig(Strict):
    """Everything in `router.yaml`."""

    instances: list[InstanceConfig] = Field(default_factory=list)
    """At least one, unless `discovery` finds them."""
    discovery: DiscoveryConfig | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes a free one."""
    policy: str | dict[str, Any] = DEFAULT_POLICY
    """A preset, `DISPATCH+ORDERING`, the path of a `policy.json`, or the fields of a policy."""
    tenants: dict[str, Any] | None = None
    """Shares, quotas and SLOs of tenants, see `core.tenants`; without it nobody asks whose a call
    is."""
    workflows: list[WorkflowConfig] = Field(default_factory=list)
    auth: AuthConfig | None = None
    """Keys of clients; without it everybody who can reach the port may call."""
    admin: AdminConfig | None = None
    """The port for operators; without it there is none."""
    tls: TlsConfig | None = None
    """TLS towards clients; without it calls and keys travel in plain text."""
    limits: LimitsConfig = LimitsConfig()
    max_body_mb: Annotated[float, Field(gt=0, le=4096)] = 64.0
    """A larger request is answered with 413."""
    max_wait_s: Annotated[float, Field(ge=0, le=3600)] = 60.0
    """How long a call without a deadline waits for an instance that can serve it, when none
    can. One with a deadline waits as long as that allows."""
    set_priority: bool = False
    """Add `priority` to each body, for servers with `--scheduling-policy priority`."""
    log_prompts: bool = False
    """Log the body of every call, at level info. Without it no log has any of them."""
    decision_log: str | None = None
    """File that every decision is appended to, as JSON lines."""
    store: StoreConfig | None = None
    """Database that keeps the decision log, what tenants use and what was learned."""
    tuner: TunerConfig | None = None
    """Online tuning of the policy; without it there is none."""
    read_load: bool = True
    """Ask each instance every two seconds, on its /metrics, for calls that others have sent."""
    dashboard: bool = True
    """Serve the live page at /dashboard; with keys its data needs the operators' one."""
    tracing: TracingConfig | None = None
    """Send OpenTelemetry spans of runs and calls to a collector."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    """`json`: one object per line."""
    log_calls: bool = False
    """Log one line per call: run, stage, tenant, instance, status, seconds; nothing of its body."""
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long calls under way may take to end when the router is told to stop. Those that take
    longer are answered with 503, streams end with an error event: another router may take them."""
    shutdown_delay_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """How long before that it takes further calls while /ready says no: load balancers need a
    while to notice."""

    @field_validator("policy", mode="before")
    @classmethod
    def _name_or_fields(cls, policy: object) -> object:
        if not isinstance(policy, str | dict):
            raise ValueError("expected a name or a mapping of fields")
        return policy

    @model_validator(mode="after")
    def _unique(self) -> RouterConfig:
        if not self.instances and self.discovery is None:
            raise ValueError("instances: expected at least one, or `discovery`, got neither")
        for kind, names in (
            ("instances", [i.id for i in self.instances]),
            ("workflows", [w.name for w in self.workflows]),
        ):
            if twice := {n for n in names if names.count(n) > 1}:
                raise ValueError(f"{kind}: declared twice: {sorted(twice)}")
        servers: dict[Server, InstanceConfig] = {}
        for instance in self.instances:
            twin = servers.setdefault(instance.server, instance)
            if twin is not instance:
                raise ValueError(
                    f"instances: expected each server once, got {instance.url} as {twin.id!r} and "
                    f"as {instance.id!r}"
                )
        if self.tuner and self.tuner.enabled and self.tuned_log is None:
            raise ValueError("tuner: expected decision_log beside it, or store with max_events")
        return self

    @property
    def tuned_log(self) -> str | None:
        """What a tuner reads, None if there is none: the decision log, else the store."""
        if self.tuner is None or not self.tuner.enabled:
            return None
        if self.decision_log is None and self.store is not None and self.store.max_events:
            return self.store.path
        return self.decision_log

    def policy_config(self) -> PolicyConfig:
        """Return the policy; reads `policy.json` if the configuration names one.

        Raises:
            ConfigError: Unknown name, or a file that cannot be used.
        """
        if isinstance(self.policy, str) and _is_path(self.policy):
            return PolicyConfig.from_file(self.policy)
        return PolicyConfig.from_mapping(self.policy, source="policy")

    def tenants_config(self) -> TenantsConfig | None:
        """Return the tenants.

        Raises:
            ConfigError: Unknown field or a value out of range, with the path to it.
        """
        if self.tenants is None:
            return None
        return TenantsConfig.from_mapping(self.tenants, source="tenants")

    @classmethod
    def from_mapping(cls, data: object, *, source: str) -> RouterConfig:
        """Check what YAML gave.

        Raises:
            ConfigError: With the path to each field that does not fit.
        """
        config = validated(cls, data, source=source)
        try:
            policy = config.policy_config()
            if config.tuner is not None:
                config.tuner.check(policy)
            config.tenants_config()
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
            policy = data.get("policy")
            is_path = isinstance(policy, str) and _is_path(policy)
            if isinstance(tuner := data.get("tuner"), dict):
                tuner.setdefault("policy_file", TunerConfig.model_fields["policy_file"].default)
            locate(data, _FILES, path.parent)
            locate(data, {"": ["policy"] if is_path else []}, path.parent)
            data |= overrides or {}
        return cls.from_mapping(data, source=str(path))


_FILES: Mapping[str, Sequence[str]] = {
    "": ("decision_log",),
    **{
        ".".join(filter(None, (where, section))): names
        for where in ("instances", "discovery.dns.template", "discovery.kubernetes.template")
        for section, names in INSTANCE_FILES.items()
    },
    "tls": ("cert_file", "key_file", "client_ca_file"),
    "auth.keys": ("key_file",),
    "admin": ("key_file",),
    "store": ("path",),
    "discovery.files": ("path",),
    "discovery.kubernetes": ("token_file", "ca_file"),
    "tuner": ("policy_file", "history_file"),
}
"""Fields that name files, by the section they stand in."""


def _is_path(policy: str) -> bool:
    return policy.endswith(".json") or "/" in policy
