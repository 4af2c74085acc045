"""Who shares a fleet, and what each may take of it: the values, read from YAML or JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.types import StageRequest

DEFAULT_LAG = 0.25
DEFAULT_CREDIT = 0.5
_MAX_COUNT = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """What one tenant may take, and what is promised to its runs."""

    name: str = ""
    """As calls give it; empty for what goes for all that are not named."""
    weight: float = 1.0
    """Share of the fleet against those of the other tenants that want it at the time, > 0."""
    max_concurrent_calls: int | None = None
    """Calls of it at the instances at a time, >= 1; further ones wait. None: as many as fit."""
    max_concurrent_runs: int | None = None
    """Runs of it under way at a time, >= 1; calls of further ones wait. A run is under way from
    its first call at an instance until its final call and those beside it have ended, or until
    it was idle for a minute."""
    tokens_per_minute: float | None = None
    """Tokens of prompts and answers, > 0; calls wait until they are within it. None: no bound."""
    burst_tokens: float | None = None
    """Tokens that it may use at once after a pause, > 0; by default those of a minute."""
    slo_s: float | None = None
    """Promised to its runs that state no SLO, > 0; None: nothing."""
    slo_scale: float | None = None
    """The same as a multiple of what a run is predicted to take alone on the fleet, > 0."""

    def __post_init__(self) -> None:
        for name in ("weight", "tokens_per_minute", "burst_tokens", "slo_s", "slo_scale"):
            value = getattr(self, name)
            if value is not None and not 1e-6 <= value <= 1e12:
                raise ConfigError(f"{name}: expected a number from 1e-6 to 1e12, got {value!r}")
        for name in ("max_concurrent_calls", "max_concurrent_runs"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _MAX_COUNT:
                raise ConfigError(f"{name}: expected an integer from 1, got {value!r}")
        if self.burst_tokens is not None and self.tokens_per_minute is None:
            raise ConfigError("burst_tokens: expected tokens_per_minute beside it, got none")
        if self.slo_s is not None and self.slo_scale is not None:
            raise ConfigError("slo_scale: expected none beside slo_s, got both")

    @property
    def has_quota(self) -> bool:
        """Whether calls may have to wait for one."""
        quotas = self.max_concurrent_calls, self.max_concurrent_runs, self.tokens_per_minute
        return quotas != (None, None, None)

    @property
    def token_rate(self) -> float | None:
        """Tokens per second."""
        return None if self.tokens_per_minute is None else self.tokens_per_minute / 60.0

    @property
    def token_burst(self) -> float:
        """Tokens that its bucket holds; `inf` without one."""
        if self.burst_tokens is not None:
            return self.burst_tokens
        return math.inf if self.tokens_per_minute is None else self.tokens_per_minute


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantsConfig:
    """All tenants, and how strictly their shares are kept."""

    named: tuple[TenantConfig, ...] = ()
    default: TenantConfig = TenantConfig()
    """Goes for each tenant that is not named, one by one, and for calls that name none."""
    lag: float = DEFAULT_LAG
    """How far a waiting tenant may be ahead of another one before it is held behind it, >= 0:
    a multiple of the work in flight per weight. 0 takes turns whatever the deadlines, a large
    one looks at deadlines alone."""
    credit: float = DEFAULT_CREDIT
    """How far a tenant that used less than its share may fall behind the one that used most,
    to be made up for when it wants more, >= 0; in the unit of `lag`."""

    def __post_init__(self) -> None:
        for name in ("lag", "credit"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1e6:
                raise ConfigError(f"{name}: expected a number from 0 to 1e6, got {value!r}")
        names = [tenant.name for tenant in self.named]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"named: expected each tenant once, got {twice} twice")

    @classmethod
    def from_mapping(cls, data: object, *, source: str) -> TenantsConfig:
        """Build from what JSON or YAML gave: `named` (name -> fields), `default`, `lag`, `credit`.

        Args:
            data: A mapping.
            source: File and field that `data` came from, for error texts.

        Raises:
            ConfigError: Unknown field, wrong type or value out of range; with the path to it.
        """
        values = dict(_mapping(data, source))
        named = _mapping(values.pop("named", {}), f"{source}.named")
        default = values.pop("default", {})
        for name, value in values.items():
            if name not in {"lag", "credit"}:
                known = ["credit", "default", "lag", "named"]
                raise ConfigError(f"{source}: unknown field {name!r}; known fields are {known}")
            values[name] = _number(value, f"{source}.{name}")
        tenants = tuple(_tenant(each, str(n), f"{source}.named.{n}") for n, each in named.items())
        default = _tenant(default, "", f"{source}.default")
        try:
            return cls(named=tenants, default=default, **values)
        except ConfigError as e:
            raise ConfigError(f"{source}.{e}") from None

    def of(self, tenant_id: str) -> TenantConfig:
        """Return what goes for a tenant."""
        for tenant in self.named:
            if tenant.name == tenant_id:
                return tenant
        return self.default


def promised(request: StageRequest, tenant: TenantConfig, fleet: Fleet) -> StageRequest:
    """Return a call with the deadline that its tenant's SLO gives its run, if there is one.

    Args:
        request: With its predictions, without a deadline.
        tenant: Whose it is.
        fleet: Prices a call in seconds.
    """
    slo_s = tenant.slo_s
    if slo_s is None and tenant.slo_scale is not None:
        service_s = fleet.mean_service_s(
            request.model, request.num_prompt_tokens, request.expected_output_tokens
        )
        slo_s = tenant.slo_scale * (service_s + request.rest_s)
    if slo_s is None:
        return request
    began = request.run_arrival_time
    return request._replace(deadline=(request.arrival_time if math.isnan(began) else began) + slo_s)


def _tenant(data: object, name: str, where: str) -> TenantConfig:
    known = {f.name: str(f.type) for f in fields(TenantConfig) if f.name != "name"}
    values: dict[str, Any] = {}
    for field, value in _mapping(data, where).items():
        if field not in known:
            raise ConfigError(f"{where}: unknown field {field!r}; known fields are {sorted(known)}")
        if known[field].startswith("float"):
            values[field] = _number(value, f"{where}.{field}")
        elif type(value) is not int:
            raise ConfigError(f"{where}.{field}: expected an integer, got {value!r}")
        else:
            values[field] = value
    try:
        return TenantConfig(name=name, **values)
    except ConfigError as e:
        raise ConfigError(f"{where}.{e}") from None


def _mapping(data: object, where: str) -> Mapping[Any, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping of fields, got {data!r:.80}")
    return data


def _number(value: object, where: str) -> float:
    if type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if not isinstance(value, float):
        raise ConfigError(f"{where}: expected a number, got {value!r:.80}")
    return value
