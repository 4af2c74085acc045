"""What one vLLM server of a level-2 simulation is started with. Needs no vLLM to be imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.types import EngineRequest

SCHEDULING_POLICIES = ("fcfs", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmServer:
    """The arguments of `vllm serve` that its scheduler depends on, under vLLM's names.

    Raises:
        ConfigError: A value that no server could be started with.
    """

    num_kv_blocks: int
    """`--num-gpu-blocks-override`. vLLM keeps one block for itself."""
    max_model_len: int
    """Tokens of prompt and answer together at most."""
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: PolicyConfig | None = field(default_factory=PolicyConfig)
    """Of `--scheduler workflow`; None: vLLM's own scheduler."""
    scheduling_policy: str = "fcfs"
    """vLLM's own `--scheduling-policy`: `fcfs` or `priority`."""
    async_scheduling: bool = True
    """On by default on GPUs: a step is planned while the one before it runs."""

    def __post_init__(self) -> None:
        least = {
            "num_kv_blocks": 2,
            "max_model_len": 2,
            "block_size": 1,
            "max_num_seqs": 1,
            "max_num_batched_tokens": 1,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise ConfigError(f"{name}: expected an integer from {minimum}, got {value!r}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: expected at least max_num_seqs = {self.max_num_seqs}, "
                f"got {self.max_num_batched_tokens}"
            )
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            raise ConfigError(
                f"scheduling_policy: expected one of {SCHEDULING_POLICIES}, "
                f"got {self.scheduling_policy!r}"
            )

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return (self.num_kv_blocks - 1) * self.block_size

    def check(self, call: EngineRequest, *, where: str) -> None:
        """Refuse a call that this server could never finish.

        Raises:
            ConfigError: The one line says which call, what is wrong, and what would fit.
        """
        where = f"{where}: call {call.request.request_id!r}"
        if call.num_prompt_tokens < 1 or call.num_output_tokens < 0:
            raise ConfigError(
                f"{where}: expected at least 1 prompt token and 0 output tokens, "
                f"got {call.num_prompt_tokens} and {call.num_output_tokens}"
            )
        # Even an empty answer has the token that ends it.
        num_tokens = call.num_prompt_tokens + max(1, call.num_output_tokens)
        if num_tokens > self.max_model_len:
            raise ConfigError(
                f"{where}: expected at most max_model_len = {self.max_model_len} tokens of prompt "
                f"and answer, got {call.num_prompt_tokens} + {call.num_output_tokens}"
            )
        # The last output token is never computed on, so it takes no place.
        if num_tokens - 1 > self.num_kv_tokens:
            raise ConfigError(
                f"{where}: expected a prompt and answer that fit into {self.num_kv_tokens} tokens "
                f"of KV cache, got {call.num_prompt_tokens} + {call.num_output_tokens}"
            )
        if any(part.num_tokens < 0 for part in call.prefix):
            raise ConfigError(f"{where}: prefix: expected parts of 0 or more tokens")
        num_prefix_tokens = sum(part.num_tokens for part in call.prefix)
        if num_prefix_tokens > call.num_prompt_tokens:
            raise ConfigError(
                f"{where}: prefix: expected parts of at most {call.num_prompt_tokens} tokens, "
                f"the length of the prompt, got {num_prefix_tokens}"
            )
        for name in ("rest_s", "service_s", "attained_s", "attained_path_s"):
            if not math.isfinite(getattr(call.request, name)):
                raise ConfigError(f"{where}: {name}: expected a finite number of seconds")
