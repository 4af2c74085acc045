"""`router.yaml`: read, checked, and turned into values of the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_workflow.core.config import DEFAULT_POLICY, PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.core.workflow import StageProfile, WorkflowProfile
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile, latency_values

_LATENCY = LatencyModel()
_Name = Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,254}[!-~])?$")]
"""Printable ASCII: it travels in headers and labels."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LatencyConfig(_Strict):
    """Step time of the model on this instance, see `core.latency.LatencyModel`.

    What is left out has the value of the profile, or of the prior from datasheets, if the
    instance names one; else the default here.
    """

    overhead_ms: Annotated[float, Field(ge=0)] = _LATENCY.overhead_s * 1e3
    weights_ms: Annotated[float, Field(ge=0)] = _LATENCY.weights_s * 1e3
    per_token_us: Annotated[float, Field(ge=0)] = _LATENCY.per_token_s * 1e6
    per_token_below_knee_us: Annotated[float, Field(ge=0)] = _LATENCY.per_token_below_knee_s * 1e6
    num_knee_tokens: Annotated[float, Field(ge=0)] | None = _LATENCY.num_knee_tokens
    per_seq_us: Annotated[float, Field(ge=0)] = _LATENCY.per_seq_s * 1e6
    per_kv_token_us: Annotated[float, Field(ge=0)] = _LATENCY.per_kv_token_s * 1e6
    per_prefill_kv_token_us: Annotated[float, Field(ge=0)] = _LATENCY.per_prefill_kv_token_s * 1e6
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = _LATENCY.max_num_batched_tokens

    def build(self, base: LatencyModel = _LATENCY) -> LatencyModel:
        """Return `base` with what is set here."""
        values = self.model_dump(include=self.model_fields_set)
        return replace(base, **latency_values(values))


class InstanceConfig(_Strict):
    """One vLLM server."""

    url: str
    """Root of the server, e.g. `http://10.0.0.7:8000`."""
    id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] = ""
    """Its name in headers, labels and logs; host and port of the url by default."""
    gpu: str = ""
    """For people only, unless `model_shape` is given; what counts then is `latency`."""
    model_shape: str = ""
    """With `gpu`: predict `latency` for this shape, e.g. `llama-3.1-8b`, on that GPU."""
    tp: Annotated[int, Field(ge=1)] = 1
    """Tensor-parallel size, for `model_shape`."""
    weight_bits: int = 16
    """Bits of a weight, for `model_shape`: 4, 8 or 16."""
    profile: str = ""
    """File that `vllm-workflow profile` wrote; replaces `model_shape`."""
    models: list[_Name] = []
    """Models it serves; asked of the server if empty."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    """As the server was started with; vLLM's own default is this, or more on large GPUs."""
    num_kv_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that its KV cache holds; by default those of the profile, or as datasheets say."""
    latency: LatencyConfig = LatencyConfig()

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        if parts.path.rstrip("/").endswith("/v1"):
            raise ValueError("expected the root of the server, without /v1")
        return url.rstrip("/")

    @model_validator(mode="before")
    @classmethod
    def _default_id(cls, data: Any) -> Any:
        if isinstance(data, dict) and "id" not in data and isinstance(data.get("url"), str):
            return {**data, "id": urlsplit(data["url"]).netloc.rpartition("@")[2]}
        return data

    def build(self, models: Sequence[str] | None = None) -> Instance:
        """Return the core's value, with `models` where the configuration names none.

        Raises:
            ConfigError: Unknown GPU or shape, or a profile that cannot be used.
        """
        profile = self._latency_profile()
        return Instance(
            instance_id=self.id,
            models=tuple(self.models or models or ()),
            latency=self.latency.build(profile.latency) if profile else self.latency.build(),
            max_num_seqs=self.max_num_seqs,
            num_kv_tokens=self.num_kv_tokens or (profile.num_kv_tokens if profile else None),
        )

    def _latency_profile(self) -> LatencyProfile | None:
        if self.profile:
            return LatencyProfile.from_file(Path(self.profile))
        if not self.model_shape:
            return None
        return catalogue.profile(
            self.gpu, self.model_shape, tp=self.tp, weight_bits=self.weight_bits
        )

    @model_validator(mode="after")
    def _check(self) -> InstanceConfig:
        for name in ("tp", "weight_bits"):
            if name in self.model_fields_set and not self.model_shape:
                raise ValueError(f"{name}: expected model_shape beside it, got none")
        self.build()
        return self


class StageConfig(_Strict):
    """One stage, means over runs, see `core.workflow.StageProfile`."""

    name: _Name
    rounds: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    prompt_tokens: Annotated[int, Field(ge=0, le=10**9)] = 256
    output_tokens: Annotated[float, Field(ge=0, le=1e9)] = 64.0


class WorkflowConfig(_Strict):
    """A workflow as its author declares it; stages in the order in which they start."""

    name: _Name
    stages: list[StageConfig]

    def build(self) -> WorkflowProfile:
        stages = tuple(StageProfile(**s.model_dump()) for s in self.stages)
        return WorkflowProfile(name=self.name, stages=stages)

    @model_validator(mode="after")
    def _check(self) -> WorkflowConfig:
        self.build()
        return self


class RouterConfig(_Strict):
    """Everything in `router.yaml`."""

    instances: Annotated[list[InstanceConfig], Field(min_length=1)]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 takes a free one."""
    policy: str | dict[str, Any] = DEFAULT_POLICY
    """A preset, `DISPATCH+ORDERING`, the path of a `policy.json`, or the fields of a policy."""
    workflows: list[WorkflowConfig] = []
    max_body_mb: Annotated[float, Field(gt=0, le=4096)] = 64.0
    """A larger request is answered with 413."""
    max_wait_s: Annotated[float, Field(ge=0, le=3600)] = 60.0
    """How long a call without a deadline waits for an instance that can serve it, when none
    can. One with a deadline waits as long as that allows."""
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
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: expected a mapping of fields, got {data!r:.80}")
        try:
            config = cls.model_validate(dict(data))
            config.policy_config()
        except ValidationError as e:
            raise ConfigError("\n".join(f"{source}: {_describe(x)}" for x in e.errors())) from None
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
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: cannot read: {e}") from None
        except yaml.YAMLError as e:
            raise ConfigError(f"{path}: not YAML: {e}") from None
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


def _describe(error: Any) -> str:
    """Say where, what was wanted and what was there."""
    where = ".".join(str(part) for part in error["loc"])
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        text = "unknown field"
    elif error["type"] != "missing" and not isinstance(error["input"], Mapping | BaseModel):
        text = f"{text}, got {error['input']!r:.80}"
    return f"{where}: {text}" if where else text
