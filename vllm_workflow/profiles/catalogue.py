"""The data files of this folder, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import Deployment, Gpu, ModelShape
from vllm_workflow.profiles.profile import LatencyProfile

_BESIDE_NUMBERS = frozenset({"aliases", "source"})


def gpu(name: str) -> Gpu:
    """Return a GPU by its name or an alias; case, blanks, `-` and `_` do not matter.

    Raises:
        ConfigError: Not in `gpus.json`.
    """
    return _gpus()[_found("gpu", name, _names("gpus.json", "gpus"))]


def shape(name: str) -> ModelShape:
    """Return a model shape by its name, an alias, or the model's name on Hugging Face.

    Raises:
        ConfigError: Not in `shapes.json`.
    """
    return _shapes()[_found("model_shape", name, _names("shapes.json", "shapes"))]


def gpu_names() -> list[str]:
    """Names that `gpu` knows, without aliases."""
    return sorted(_gpus())


def shape_names() -> list[str]:
    """Names that `shape` knows, without aliases."""
    return sorted(_shapes())


def deployment(gpu_name: str, shape_name: str, *, tp: int = 1, weight_bits: int = 16) -> Deployment:
    """Return a model on GPUs, all by name.

    Raises:
        ConfigError: Unknown name, or numbers that do not fit.
    """
    return Deployment(gpu=gpu(gpu_name), shape=shape(shape_name), tp=tp, weight_bits=weight_bits)


def profile(
    gpu_name: str,
    shape_name: str,
    *,
    tp: int = 1,
    weight_bits: int = 16,
    max_num_batched_tokens: int | None = None,
) -> LatencyProfile:
    """Return the measured profile if there is one, else the prior from datasheets.

    Args:
        gpu_name: See `gpu`.
        shape_name: See `shape`.
        tp: Tensor-parallel size.
        weight_bits: 4, 8 or 16.
        max_num_batched_tokens: As the server was started with; by default what the profile
            was measured with, 2048 for a prior.

    Raises:
        ConfigError: Unknown name, numbers that do not fit, or too little memory.
    """
    wanted = deployment(gpu_name, shape_name, tp=tp, weight_bits=weight_bits)
    measured = _measured().get((wanted.gpu.name, wanted.shape.name, tp, weight_bits))
    found = measured or prior(wanted)
    if max_num_batched_tokens is None:
        return found
    latency = replace(found.latency, max_num_batched_tokens=max_num_batched_tokens)
    return replace(found, latency=latency)


def prior(wanted: Deployment) -> LatencyProfile:
    """Return what datasheets and the model's shape say, measured or not.

    Raises:
        ConfigError: The weights do not fit into the memory.
    """
    return LatencyProfile(
        latency=wanted.latency(),
        source=f"prior: {_read('gpus.json')['gpus'][wanted.gpu.name]['source']}",
        gpu=wanted.gpu.name,
        model_shape=wanted.shape.name,
        tp=wanted.tp,
        weight_bits=wanted.weight_bits,
        num_kv_blocks=wanted.num_kv_blocks(),
        block_size=16,
    )


@cache
def _read(file_name: str) -> Mapping[str, Any]:
    text = (files(__package__) / file_name).read_text(encoding="utf-8")
    data: Mapping[str, Any] = json.loads(text)
    return data


@cache
def _gpus() -> Mapping[str, Gpu]:
    entries = _read("gpus.json")["gpus"].items()
    return {name: Gpu(name=name, **_numbers(entry)) for name, entry in entries}


@cache
def _shapes() -> Mapping[str, ModelShape]:
    entries = _read("shapes.json")["shapes"].items()
    return {name: ModelShape(name=name, **_numbers(entry)) for name, entry in entries}


@cache
def _measured() -> Mapping[tuple[str, str, int, int], LatencyProfile]:
    found = {}
    for path in (files(__package__) / "measured").iterdir():
        if path.name.endswith(".json"):
            each = LatencyProfile.from_json(path.read_text(encoding="utf-8"), source=path.name)
            found[each.gpu, each.model_shape, each.tp, each.weight_bits] = each
    return found


@cache
def _names(file_name: str, kind: str) -> Mapping[str, str]:
    """Every spelling -> name."""
    return {
        _plain(spelling): name
        for name, entry in _read(file_name)[kind].items()
        for spelling in (name, *entry["aliases"])
    }


def _found(kind: str, name: str, names: Mapping[str, str]) -> str:
    try:
        return names[_plain(name)]
    except KeyError:
        known = sorted(set(names.values()))
        raise ConfigError(f"{kind}: expected one of {known}, got {name!r}") from None


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _BESIDE_NUMBERS}
