"""Published benchmark tables as observations of the latency model."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.fit import Observation, StepLoad
from vllm_workflow.core.hardware import Deployment
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.profiles import catalogue

BUDGET = 8192
"""`max_num_batched_tokens` of the servers, vLLM's default on these GPUs; not in the table."""
_COLUMNS = ("isl", "osl", "batch_size", "tp_size", "silicon_tpot_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRow:
    """A closed loop of `num_seqs` clients, each with `isl` prompt and `osl` output tokens."""

    deployment: Deployment
    isl: int
    osl: int
    num_seqs: int
    tpot_s: float

    @property
    def cell(self) -> str:
        d = self.deployment
        return f"{d.gpu.name} {d.shape.name} {d.weight_bits}-bit tp{d.tp}"

    @property
    def prior(self) -> LatencyModel:
        return self.deployment.latency(max_num_batched_tokens=BUDGET)

    @property
    def is_kv_bound(self) -> bool:
        """Whether full-grown requests of all clients exceed the predicted KV cache."""
        return self.num_seqs * (self.isl + self.osl) > 16 * self.deployment.num_kv_blocks()

    @property
    def is_credible(self) -> bool:
        """Whether the GPU could do it: see `roofline_share` of the 8B rows."""
        return self.deployment.shape.name != "llama-3.1-8b"

    @property
    def observation(self) -> Observation:
        """The decode window of one request: while it runs, every other client begins one.

        Of those that do not fit into the KV cache, only as many as do are taken to run.
        """
        num_steps, context = self.osl - 1, self.isl + self.osl / 2
        capacity = 16 * self.deployment.num_kv_blocks() / context
        num_seqs = max(1.0, min(float(self.num_seqs), capacity))
        plain = StepLoad(num_decode_seqs=num_seqs, num_kv_tokens=num_seqs * context)
        num_prompts = (num_seqs - 1) * num_steps / self.osl
        num_chunks = math.ceil(self.isl / (BUDGET - num_seqs))
        num_mixed = min(float(num_steps), num_prompts * num_chunks)
        loads = [replace(plain, count=num_steps - num_mixed)]
        if num_mixed > 0.0:
            mixed = replace(
                plain,
                count=num_mixed,
                num_prefill_tokens=num_prompts * self.isl / num_mixed,
                prefill_attention=num_prompts * prefill_attention(self.isl) / num_mixed,
            )
            loads.append(mixed)
        return Observation(seconds=self.tpot_s * num_steps, loads=tuple(loads))

    @property
    def roofline_share(self) -> float:
        """Reading plus arithmetic at the datasheet's full speed, over measured time."""
        d, gpu, shape = self.deployment, self.deployment.gpu, self.deployment.shape
        bandwidth, flops_8, flops_16 = gpu.bandwidth_gb_s * 1e9, gpu.tflops_8, gpu.tflops_16
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim
        ideal_s = 0.0
        for load in self.observation.loads:
            num_tokens = load.num_prefill_tokens + load.num_decode_seqs
            read_bytes = shape.num_layer_params / d.tp + load.num_kv_tokens * d.kv_bytes_per_token
            ops_8 = 2 * shape.num_layer_params * num_tokens / d.tp
            ops_16 = attention * load.prefill_attention / d.tp
            ideal_s += load.count * (
                read_bytes / bandwidth + ops_8 / (flops_8 * 1e12) + ops_16 / (flops_16 * 1e12)
            )
        return ideal_s / self.observation.seconds


def read_serving_rows(path: Path) -> list[ServingRow]:
    """Read the table.

    Raises:
        ConfigError: With file, line, column, what was there and what was wanted.
    """
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows.extend(_row(row, f"{path}, line {reader.line_num}") for row in reader)
    except OSError as e:
        raise ConfigError(f"{path}: cannot read: {e}") from None
    return rows


def _row(row: Mapping[str, str], where: str) -> ServingRow:
    for name in ("system", "model_path", "precision", *_COLUMNS):
        if not row.get(name):
            raise ConfigError(f"{where}: column {name!r} is missing; there are {sorted(row)}")
    numbers = {}
    for name in _COLUMNS:
        try:
            numbers[name] = float(row[name])
        except ValueError:
            numbers[name] = math.nan
        if not numbers[name] > 0.0:
            raise ConfigError(f"{where}: {name}: expected a number above 0, got {row[name]!r}")
    if row["precision"] != "fp8":
        raise ConfigError(f"{where}: precision: expected 'fp8', got {row['precision']!r}")
    try:
        deployment = catalogue.deployment(
            row["system"].replace("_", "-"),
            row["model_path"],
            tp=int(numbers["tp_size"]),
            weight_bits=8,
        )
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    return ServingRow(
        deployment=deployment,
        isl=int(numbers["isl"]),
        osl=int(numbers["osl"]),
        num_seqs=int(numbers["batch_size"]),
        tpot_s=numbers["silicon_tpot_ms"] / 1e3,
    )


def read_pairs(requests: Path, throughputs: Path) -> list[Observation]:
    """Read single requests, alone on an instance: lengths, and requests per second.

    Raises:
        ConfigError: With file, line, what was there and what was wanted.
    """
    observations = []
    lengths, rates = _lines(requests), _lines(throughputs)
    if len(lengths) != len(rates):
        raise ConfigError(f"{throughputs}: expected {len(lengths)} lines, got {len(rates)}")
    for line, (pair, rate) in enumerate(zip(lengths, rates), start=1):
        try:
            num_prompt, num_output = (int(n) for n in ast.literal_eval(pair))
        except (ValueError, SyntaxError, TypeError):
            raise ConfigError(
                f"{requests}, line {line}: expected (prompt, output) tokens, got {pair!r}"
            ) from None
        try:
            seconds = 1.0 / float(rate)
        except (ValueError, ZeroDivisionError):
            raise ConfigError(
                f"{throughputs}, line {line}: expected requests per second, got {rate!r}"
            ) from None
        observations.append(_alone(num_prompt, num_output, seconds))
    return observations


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ConfigError(f"{path}: cannot read: {e}") from None


def _alone(num_prompt: int, num_output: int, seconds: float) -> Observation:
    num_chunks = math.ceil(num_prompt / BUDGET)
    prefill = StepLoad(
        count=num_chunks,
        num_prefill_tokens=num_prompt / num_chunks,
        prefill_attention=prefill_attention(num_prompt) / num_chunks,
    )
    decode = StepLoad(
        count=num_output - 1, num_decode_seqs=1, num_kv_tokens=num_prompt + num_output / 2
    )
    return Observation(seconds=seconds, loads=(prefill, decode))
