"""What a GPU and a model's shape say about latency and memory before anything is measured.

The formulas count what a step must do (bytes read, operations, all-reduces) and divide by
what the GPU achieves of its datasheet. Both are data, see `vllm_workflow/profiles/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.latency import LatencyModel

LAYER_S = 30e-6
"""Kernel start-up and tail of one layer. With it, one bandwidth efficiency per GPU explains
8B bf16 kernel tables and 70B fp8 steps; 32 µs is what BLIS fitted over models and GPUs."""
SEQ_S = 10e-6
"""Sampling and bookkeeping of one sequence in one step."""
BELOW_KNEE_SHARE = 0.45
"""Price of a token below the knee over one above: median of fits to seven GPUs (0.36 - 0.62)."""
EIGHT_BIT_SHARE = 0.8
"""8-bit arithmetic reaches this share of what 16-bit arithmetic reaches of its datasheet number:
activations are quantised first. From Llama-3.1-70B fp8 steps on H100, tp 2, 4 and 8."""
RESERVED_GIB = 1.2
"""Activations, CUDA graphs and context per GPU: a 24 GiB card with Llama-3.1-8B, 0.9 of memory
and 2048 batched tokens got 2588 blocks, which leaves 1.1 GiB."""
WEIGHT_BITS = (4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU model, per card. Efficiencies are achieved over datasheet."""

    name: str
    memory_gib: float
    """As the driver reports it: below the number on the box."""
    bandwidth_gb_s: float
    tflops_16: float
    """Dense 16-bit floating point with 32-bit accumulation."""
    tflops_8: float
    """Dense 8-bit floating point; the 16-bit number if the GPU has none."""
    weights_efficiency: float
    compute_efficiency: float
    kv_efficiency: float
    attention_efficiency: float
    allreduce_base_us: float
    """Of one small all-reduce, beside `allreduce_per_gpu_us` for each GPU that takes part."""
    allreduce_per_gpu_us: float
    link_gb_s: float
    """Between GPUs of one server, one direction."""

    def __post_init__(self) -> None:
        _check_numbers(self, f"gpu {self.name}")
        for f in fields(self):
            if f.name.endswith("efficiency") and getattr(self, f.name) > 1.0:
                raise ConfigError(
                    f"gpu {self.name}.{f.name}: expected a share of at most 1, "
                    f"got {getattr(self, f.name)!r}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers of a dense decoder's `config.json` that cost time or memory."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, f"model shape {self.name}")

    @property
    def num_layer_params(self) -> int:
        """Weights of all layers, without embedding and logits."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_vocab_params(self) -> int:
        """Weights of the logits; the embedding has as many, unless they are tied."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on one or several equal GPUs, as one vLLM server runs it.

    Embedding and logits stay at 16 bits. 4-bit weights are widened before arithmetic, and
    8-bit ones too where the GPU has no 8-bit arithmetic.

    Raises:
        ConfigError: Bits that are not supported, or a `tp` that does not divide the heads.
    """

    gpu: Gpu
    shape: ModelShape
    tp: int = 1
    weight_bits: int = 16

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS:
            raise ConfigError(f"weight_bits: expected one of {WEIGHT_BITS}, got {self.weight_bits}")
        if self.tp < 1 or self.shape.num_heads % self.tp:
            raise ConfigError(
                f"tp: expected a divisor of the {self.shape.num_heads} attention heads of "
                f"{self.shape.name}, got {self.tp}"
            )

    @property
    def weight_bytes(self) -> float:
        """Memory that the weights take on one GPU."""
        num_tables = 1 if self.shape.tied_embeddings else 2
        return self._layer_bytes + num_tables * 2 * self.shape.num_vocab_params / self.tp

    @property
    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token on one GPU; heads are copied when `tp` exceeds them."""
        num_heads = max(1.0, self.shape.num_kv_heads / self.tp)
        return 2 * 2 * self.shape.num_layers * num_heads * self.shape.head_dim

    def latency(self, *, max_num_batched_tokens: int = 2048) -> LatencyModel:
        """Predict the step time; expect an error of 10 - 15 % where nothing was measured."""
        gpu, shape = self.gpu, self.shape
        bandwidth = gpu.bandwidth_gb_s * 1e9
        flops = gpu.tflops_16 * 1e12
        if self.weight_bits == 8:
            flops = max(flops, EIGHT_BIT_SHARE * gpu.tflops_8 * 1e12)
        read_bytes = self._layer_bytes + 2 * shape.num_vocab_params / self.tp
        token_s = 2 * shape.num_layer_params / self.tp / (flops * gpu.compute_efficiency)
        token_s += self._allreduce_token_s
        logits_s = 2 * shape.num_vocab_params / self.tp / (gpu.tflops_16 * 1e12)
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim / self.tp
        return LatencyModel(
            overhead_s=shape.num_layers * LAYER_S + self._allreduce_step_s,
            weights_s=read_bytes / (bandwidth * gpu.weights_efficiency),
            per_token_s=token_s,
            per_token_below_knee_s=BELOW_KNEE_SHARE * token_s,
            per_seq_s=SEQ_S + logits_s / gpu.compute_efficiency,
            per_kv_token_s=self.kv_bytes_per_token / (bandwidth * gpu.kv_efficiency),
            per_prefill_kv_token_s=attention / (gpu.tflops_16 * 1e12 * gpu.attention_efficiency),
            max_num_batched_tokens=max_num_batched_tokens,
        )

    def num_kv_blocks(self, *, gpu_memory_utilization: float = 0.9, block_size: int = 16) -> int:
        """Blocks of the KV cache that vLLM would find room for.

        Raises:
            ConfigError: The weights do not leave room for one block.
        """
        room_gib = self.gpu.memory_gib * gpu_memory_utilization - RESERVED_GIB
        free_bytes = room_gib * 2**30 - self.weight_bytes
        num_blocks = math.floor(free_bytes / (self.kv_bytes_per_token * block_size))
        if num_blocks < 1:
            raise ConfigError(
                f"{self.shape.name} at {self.weight_bits} bits: expected weights below "
                f"{room_gib:.1f} GiB on each of {self.tp} × {self.gpu.name}, got "
                f"{self.weight_bytes / 2**30:.1f} GiB; raise tp or lower weight_bits"
            )
        return num_blocks

    @property
    def _layer_bytes(self) -> float:
        return self.shape.num_layer_params * self.weight_bits / 8 / self.tp

    @property
    def _allreduce_step_s(self) -> float:
        """Two all-reduces per layer, whatever the number of tokens."""
        if self.tp == 1:
            return 0.0
        each_us = self.gpu.allreduce_base_us + self.tp * self.gpu.allreduce_per_gpu_us
        return 2 * self.shape.num_layers * each_us * 1e-6

    @property
    def _allreduce_token_s(self) -> float:
        sent_bytes = 2 * (self.tp - 1) / self.tp * 2 * self.shape.hidden_size
        return 2 * self.shape.num_layers * sent_bytes / (self.gpu.link_gb_s * 1e9)


def _check_numbers(value: Gpu | ModelShape, where: str) -> None:
    for f in fields(value):
        number = getattr(value, f.name)
        if isinstance(number, str | bool):
            continue
        if not 0 < number < math.inf:
            raise ConfigError(f"{where}.{f.name}: expected a number above 0, got {number!r}")
