"""A fleet by name: `A100:2,A6000:1,L40S:1` or `fleet.yaml`, turned into instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError, because
from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile
from vllm_workflow.sim.engine import DEFAULT_BLOCK_SIZE, EventEngine
from vllm_workflow.sim.types import SimEngine

_MAX_COUNT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """Equal instances as a fleet file describes them; names as in `vllm serve`."""

    gpu: str
    count: int = 1
    model_shape: str = "llama-3.1-8b"
    tp: int = 1
    weight_bits: int = 16
    profile: str = ""
    """File that `vllm-workflow profile` wrote; replaces what is known of `gpu`."""
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float = 0.9
    num_kv_blocks: int | None = None
    """None: what the memory leaves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimInstance:
    """One instance: what the router believes of it, and what it is."""

    instance: Instance
    """As configured in the router."""
    num_kv_blocks: int
    block_size: int = DEFAULT_BLOCK_SIZE
    actual: LatencyModel | None = None
    """Its real step time, where the router is wrong about it; `instance.latency` if None."""

    @property
    def latency(self) -> LatencyModel:
        return self.actual or self.instance.latency


EngineFactory = Callable[[SimInstance, PolicyConfig], SimEngine]
"""Makes the engine of an instance; `event_engine` is level 1."""


def event_engine(instance: SimInstance, policy: PolicyConfig) -> SimEngine:
    """Make a level 1 engine."""
    return EventEngine(
        instance.instance.instance_id,
        instance.latency,
        config=policy,
        max_num_seqs=instance.instance.max_num_seqs,
        num_kv_blocks=instance.num_kv_blocks,
        block_size=instance.block_size,
        async_scheduling=True,
    )


def fleet_of(
    spec: str,
    *,
    model_shape: str = "llama-3.1-8b",
    tp: int = 1,
    weight_bits: int = 16,
    gpu_memory_utilization: float = 0.9,
) -> tuple[SimInstance, ...]:
    """Build a fleet.

    Args:
        spec: `GPU:COUNT,…`, where `:1` may be left out, or the path of a YAML file with a list
            of `InstanceSpec` fields.
        model_shape: For instances that do not name one.
        tp: Likewise.
        weight_bits: Likewise.
        gpu_memory_utilization: Likewise.

    Raises:
        ConfigError: Unknown GPU or field, a number out of range, or a model that does not fit.
    """
    return build_fleet(
        specs_of(
            spec,
            model_shape=model_shape,
            tp=tp,
            weight_bits=weight_bits,
            gpu_memory_utilization=gpu_memory_utilization,
        )
    )


def specs_of(
    spec: str,
    *,
    model_shape: str = "llama-3.1-8b",
    tp: int = 1,
    weight_bits: int = 16,
    gpu_memory_utilization: float = 0.9,
) -> list[InstanceSpec]:
    """Read what `fleet_of` builds a fleet of; arguments as there.

    Raises:
        ConfigError: An unreadable file, unknown field or malformed text.
    """
    defaults = InstanceSpec(
        gpu="",
        model_shape=model_shape,
        tp=tp,
        weight_bits=weight_bits,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    if spec.endswith((".yaml", ".yml", ".json")):
        return _from_file(Path(spec), defaults)
    return _from_text(spec, defaults)


def build_fleet(specs: Sequence[InstanceSpec]) -> tuple[SimInstance, ...]:
    """Build the instances of `specs`, each named after its GPU and numbered.

    Raises:
        ConfigError: See `fleet_of`.
    """
    if not specs:
        raise ConfigError("fleet: expected at least one instance, got none")
    numbers: dict[str, int] = {}
    built: list[SimInstance] = []
    for spec in specs:
        for _ in range(_checked(spec).count):
            name = spec.gpu.lower().replace(" ", "-")
            number = numbers[name] = numbers.get(name, -1) + 1
            built.append(_build(spec, f"{name}-{number}"))
    return tuple(built)


def _build(spec: InstanceSpec, instance_id: str) -> SimInstance:
    if spec.profile:
        found = LatencyProfile.from_file(Path(spec.profile))
        latency = replace(found.latency, max_num_batched_tokens=spec.max_num_batched_tokens)
        found = replace(found, latency=latency)
    else:
        found = catalogue.profile(
            spec.gpu,
            spec.model_shape,
            tp=spec.tp,
            weight_bits=spec.weight_bits,
            max_num_batched_tokens=spec.max_num_batched_tokens,
        )
    block_size = found.block_size or DEFAULT_BLOCK_SIZE
    num_kv_blocks = spec.num_kv_blocks or _num_kv_blocks(spec, block_size)
    return SimInstance(
        instance=Instance(
            instance_id=instance_id,
            models=(),
            latency=found.latency,
            max_num_seqs=spec.max_num_seqs,
            num_kv_tokens=(num_kv_blocks - 1) * block_size,  # vLLM keeps one block for itself
        ),
        num_kv_blocks=num_kv_blocks,
        block_size=block_size,
    )


def _num_kv_blocks(spec: InstanceSpec, block_size: int) -> int:
    deployment = catalogue.deployment(
        spec.gpu, spec.model_shape, tp=spec.tp, weight_bits=spec.weight_bits
    )
    return deployment.num_kv_blocks(
        gpu_memory_utilization=spec.gpu_memory_utilization, block_size=block_size
    )


def _checked(spec: InstanceSpec) -> InstanceSpec:
    for name, most in (
        ("count", _MAX_COUNT),
        ("tp", 1024),
        ("max_num_seqs", 1 << 20),
        ("max_num_batched_tokens", 1 << 24),
        ("num_kv_blocks", 1 << 30),
    ):
        value = getattr(spec, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(
                f"fleet: {spec.gpu}: {name}: expected an integer from 1 to {most}, got {value!r}"
            )
    if not 0.0 < spec.gpu_memory_utilization <= 1.0:
        raise ConfigError(
            f"fleet: {spec.gpu}: gpu_memory_utilization: expected a share above 0 and at most "
            f"1, got {spec.gpu_memory_utilization!r}"
        )
    return spec


def _from_text(text: str, defaults: InstanceSpec) -> list[InstanceSpec]:
    specs = []
    for item in text.split(","):
        gpu, _, count = item.strip().partition(":")
        if not gpu or (count and not (count.isascii() and count.isdigit())):
            raise ConfigError(f"fleet: expected GPU:COUNT,…, e.g. A100:2,L40S:1, got {text!r}")
        specs.append(replace(defaults, gpu=gpu, count=int(count) if count else 1))
    return specs


def _from_file(path: Path, defaults: InstanceSpec) -> list[InstanceSpec]:
    import yaml  # only whoever has such a file needs it

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: cannot read fleet: {because(e)}") from None
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{path}: expected a list of instances, got {data!r:.80}")
    return [_from_mapping(entry, defaults, f"{path}: instance {i}") for i, entry in enumerate(data)]


def _from_mapping(data: object, defaults: InstanceSpec, where: str) -> InstanceSpec:
    if not isinstance(data, Mapping) or "gpu" not in data:
        raise ConfigError(f"{where}: expected a mapping with `gpu`, got {data!r:.80}")
    known = {f.name: str(f.type) for f in fields(InstanceSpec)}
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name!r}; known fields are {sorted(known)}")
        wanted = known[name].removesuffix(" | None")
        if wanted == "float" and type(value) is int:
            value = float(value)
        if type(value).__name__ != wanted:
            raise ConfigError(f"{where}: {name}: expected {wanted}, got {value!r}")
        values[name] = value
    return replace(defaults, **values)
