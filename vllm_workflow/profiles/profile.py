"""A latency profile as a file: JSON with the unit in the name of every number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError, because
from vllm_workflow.core.latency import LatencyModel

SCHEMA_VERSION = 1
_LATENCY_UNITS: Mapping[str, tuple[str, float]] = {
    "overhead_ms": ("overhead_s", 1e3),
    "weights_ms": ("weights_s", 1e3),
    "per_token_us": ("per_token_s", 1e6),
    "per_token_below_knee_us": ("per_token_below_knee_s", 1e6),
    "num_knee_tokens": ("num_knee_tokens", 1.0),
    "per_seq_us": ("per_seq_s", 1e6),
    "per_kv_token_us": ("per_kv_token_s", 1e6),
    "per_prefill_kv_token_us": ("per_prefill_kv_token_s", 1e6),
    "max_num_batched_tokens": ("max_num_batched_tokens", 1.0),
}
"""Field in a file -> field of `LatencyModel`, and what to multiply the latter by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyProfile:
    """What is known of one model on one kind of instance, and from where."""

    latency: LatencyModel
    source: str = ""
    gpu: str = ""
    model_shape: str = ""
    tp: int = 1
    weight_bits: int = 16
    request_overhead_s: float = 0.0
    """Of one request beside the engine's steps: HTTP, tokenising."""
    num_kv_blocks: int | None = None
    block_size: int | None = None
    """Tokens of one KV block."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured: server version, model, sizes, date."""
    residuals: Mapping[str, Any] = field(default_factory=dict)
    """Errors of the model on what it was fitted to, as shares of the measured durations."""

    @property
    def num_kv_tokens(self) -> int | None:
        """Tokens that the KV cache holds, None if that is not known."""
        if self.num_kv_blocks is None or self.block_size is None:
            return None
        return self.num_kv_blocks * self.block_size

    def to_json(self) -> str:
        """Return the text of the file."""
        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "gpu": self.gpu,
            "model_shape": self.model_shape,
            "tp": self.tp,
            "weight_bits": self.weight_bits,
            "latency": latency_to_mapping(self.latency),
            "request_overhead_ms": _rounded(self.request_overhead_s * 1e3),
            "num_kv_blocks": self.num_kv_blocks,
            "block_size": self.block_size,
            "source": self.source,
            "conditions": dict(self.conditions),
            "residuals": dict(self.residuals),
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str) -> LatencyProfile:
        """Read what `to_json` wrote, or somebody with an editor.

        Args:
            text: Of the file.
            source: Its name, for errors.

        Raises:
            ConfigError: With file, field, what was there and what was wanted.
        """
        try:
            data = json.loads(text)
        except ValueError as e:
            raise ConfigError(f"{source}: not JSON: {e}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: expected an object of fields, got {data!r:.80}")
        for name in data:
            if name not in _FIELDS:
                raise ConfigError(
                    f"{source}: unknown field {name!r}; known fields are {sorted(_FIELDS)}"
                )
        values = {name: _read(data, name, source) for name in _FIELDS}
        if values.pop("schema_version") != SCHEMA_VERSION:
            raise ConfigError(
                f"{source}: schema_version: expected {SCHEMA_VERSION}, "
                f"got {data['schema_version']!r}"
            )
        overhead_ms = values.pop("request_overhead_ms")
        latency = latency_from_mapping(values.pop("latency"), source=source)
        return cls(latency=latency, request_overhead_s=overhead_ms / 1e3, **values)

    @classmethod
    def from_file(cls, path: Path) -> LatencyProfile:
        """Read a profile file.

        Raises:
            ConfigError: It cannot be read or does not fit.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: cannot read profile: {because(e)}") from None
        return cls.from_json(text, source=str(path))


def latency_to_mapping(latency: LatencyModel) -> dict[str, float | int]:
    """Return the fields of a file or of `latency` in `router.yaml`; those not set are left out."""
    plain: dict[str, float | int] = {}
    for name, (attribute, factor) in _LATENCY_UNITS.items():
        value = getattr(latency, attribute)
        if value is not None:
            plain[name] = value if isinstance(value, int) else _rounded(value * factor)
    return plain


def latency_from_mapping(data: Mapping[str, Any], *, source: str) -> LatencyModel:
    """Read what `latency_to_mapping` returned; what is left out has the default.

    Raises:
        ConfigError: Unknown field, no number, or numbers that make no sense.
    """
    for name, value in data.items():
        if name not in _LATENCY_UNITS:
            raise ConfigError(
                f"{source}: unknown field 'latency.{name}'; "
                f"known fields are {sorted(_LATENCY_UNITS)}"
            )
        wanted = (int,) if name == "max_num_batched_tokens" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not value >= 0:
            kind = "an integer" if wanted == (int,) else "a number"
            raise ConfigError(f"{source}: latency.{name}: expected {kind} from 0, got {value!r}")
    try:
        return LatencyModel(**latency_values(data))
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None


def latency_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Turn fields of a file into fields of `LatencyModel`; they must have been checked."""
    values: dict[str, Any] = {}
    for name, value in data.items():
        attribute, factor = _LATENCY_UNITS[name]
        values[attribute] = value if value is None or factor == 1.0 else value / factor
    return values


_MISSING = object()
_FIELDS: Mapping[str, tuple[tuple[type, ...], Any]] = {
    "schema_version": ((int,), _MISSING),
    "gpu": ((str,), ""),
    "model_shape": ((str,), ""),
    "tp": ((int,), 1),
    "weight_bits": ((int,), 16),
    "latency": ((dict,), _MISSING),
    "request_overhead_ms": ((int, float), 0.0),
    "num_kv_blocks": ((int, type(None)), None),
    "block_size": ((int, type(None)), None),
    "source": ((str,), _MISSING),
    "conditions": ((dict,), {}),
    "residuals": ((dict,), {}),
}
"""Field of a file -> accepted types and default."""


def _read(data: Mapping[str, Any], name: str, source: str) -> Any:
    types, default = _FIELDS[name]
    value = data.get(name, default)
    if value is _MISSING:
        raise ConfigError(f"{source}: {name}: missing")
    names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
    if isinstance(value, bool) or not isinstance(value, types):
        raise ConfigError(f"{source}: {name}: expected {names}, got {value!r:.80}")
    if isinstance(value, int | float) and not value >= 0:
        raise ConfigError(f"{source}: {name}: expected a number from 0, got {value!r}")
    return value


def _rounded(value: float) -> float:
    """Five significant digits: more were never measured."""
    return float(f"{value:.5g}")
