"""A vLLM worker without a model: each step takes the time that the emulated GPU would take.

API server, tokenizer, engine core, scheduler, KV-cache manager and prefix cache are vLLM's own;
only the forward pass is not. The answer of a request is one token again and again, as many as
`max_tokens` says, or until the end token at a length that only `vllm_xargs` of the request tell
(`emulated_num_output_tokens`), which schedulers have no business to read.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation import compat
from vllm_workflow.emulation.requests import EmulatedRequests, Step
from vllm_workflow.emulation.settings import EmulationSettings
from vllm_workflow.emulation.stats import HELP_TEXTS, samples
from vllm_workflow.emulation.timeline import Timeline
from vllm_workflow.emulation.tokens import TokenChoice
from vllm_workflow.vllm_metrics import SeriesFiles, engine_directory, engine_labels

logger = logging.getLogger("vllm.workflow")


class EmulatedGpuWorker(WorkerBase):
    """What the executor drives in place of a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what `WorkerBase` takes.

        Raises:
            ConfigError: No settings, or vLLM of unknown shape.
        """
        compat.check()
        super().__init__(*args, **kwargs)
        settings = EmulationSettings.from_environment()
        if settings is None:
            raise ConfigError("emulated GPU: no settings; start the server with --emulate-gpu")
        self._settings = settings
        self._latency = settings.profile.latency
        self._timeline = Timeline(time_scale=settings.scale)
        self._launched: tuple[Step, float] | None = None
        self._files: SeriesFiles | None = None
        self._info: dict[str, str] = {}
        self._requests: EmulatedRequests
        self._tokens: TokenChoice

    # Start-up, in the order of the calls.

    def init_device(self) -> None:
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the tokenizer only: the answers shall be text."""
        from vllm.tokenizers import cached_tokenizer_from_config

        self._tokens = TokenChoice(cached_tokenizer_from_config(self.model_config))
        self._requests = EmulatedRequests(token_id=self._tokens.plain_id)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        """Say what vLLM's KV-cache manager divides the memory by."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size,
            num_kv_heads=self.model_config.get_num_kv_heads(self.parallel_config),
            head_size=self.model_config.get_head_size(),
            dtype=torch.bfloat16,
        )
        num_layers = self.model_config.get_num_layers(self.parallel_config)
        return {f"model.layers.{i}.self_attn.attn": spec for i in range(num_layers)}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBNHC"]

    def determine_available_memory(self) -> int:
        """Bytes for which vLLM makes as many KV blocks as the emulated GPU has.

        Raises:
            ConfigError: The emulated model does not fit into the emulated memory.
        """
        if self.cache_config.kv_cache_memory_bytes:
            return int(self.cache_config.kv_cache_memory_bytes)
        num_tokens = self._settings.num_kv_tokens(self.cache_config.gpu_memory_utilization)
        num_blocks = num_tokens // self.cache_config.block_size
        spec = self.get_kv_cache_spec().values()
        return num_blocks * sum(layer.page_size_bytes for layer in spec)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Take no memory: nobody writes a KV cache here."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """The last call of the start-up: show what this is."""
        self._info = {
            "gpu": self._settings.profile.gpu or self._settings.gpu,
            "model_shape": self._settings.profile.model_shape,
            "tp": str(self._settings.profile.tp),
            "weight_bits": str(self._settings.profile.weight_bits),
            "time_scale": f"{self._settings.scale:g}",
        }
        directory = engine_directory()
        if directory is not None:
            labels = engine_labels(self.vllm_config)
            self._files = SeriesFiles(directory, labels, part="emulated", help_texts=HELP_TEXTS)
            self._files.write(samples(self._timeline, self._info))
        return CompilationTimes(0.0, 0.0)

    # Steps.

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """Launch a step on the emulated GPU; `sample_tokens` returns what comes of it."""
        self._requests.forget(scheduler_output.finished_req_ids)
        if scheduler_output.total_num_scheduled_tokens == 0:
            if not self._requests:
                self._publish()
            return EMPTY_MODEL_RUNNER_OUTPUT
        step = self._requests.step(scheduler_output)
        end = self._timeline.launch(
            step.duration_s(self._latency), time.monotonic(), continues=step.continues
        )
        self._launched = (step, end)
        return None

    def sample_tokens(self, grammar_output: Any) -> AsyncModelRunnerOutput:
        """Return the output of the step just launched, to be waited for."""
        assert self._launched is not None, "sample_tokens() without execute_model()"
        (step, end), self._launched = self._launched, None
        index = {request_id: i for i, request_id in enumerate(step.request_ids)}
        if grammar_output is not None:
            self._obey(grammar_output, step, index)
        output = ModelRunnerOutput(
            req_ids=step.request_ids, req_id_to_index=index, sampled_token_ids=step.token_ids
        )
        return _StepOutput(self, output, end)

    def handed_over(self, end: float) -> None:
        """Take note that the scheduler gets the output of the step that ended at `end`."""
        self._timeline.handed_over(end, time.monotonic())
        if self._files is not None and self._files.is_due():
            self._publish()

    def _obey(self, grammar_output: Any, step: Step, index: dict[str, int]) -> None:
        """Replace the tokens of requests with structured output by what their grammars allow."""
        rows = grammar_output.grammar_bitmask
        for row, request_id in zip(rows, grammar_output.structured_output_request_ids):
            place = index.get(request_id)
            if place is None or not step.token_ids[place]:
                continue
            request = self._requests[request_id]
            number = step.output_numbers.get(request_id)
            token_id = self._tokens.allowed(
                row,
                end_token_id=request.end_token_id,
                is_over=number is None or number >= request.end_at,
            )
            step.token_ids[place] = [token_id]

    def _publish(self) -> None:
        if self._files is not None:
            self._files.write(samples(self._timeline, self._info))

    # What vLLM may call besides, and for which there is nothing to do.

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()

    def take_draft_token_ids(self) -> None:
        return None

    def execute_dummy_batch(self) -> None:
        """With data parallelism: this engine has nothing to run in this step."""

    def synchronize_device(self) -> None:
        pass

    def reset_encoder_cache(self) -> None:
        pass

    def profile(self, is_start: bool = True, profile_prefix: str | None = None) -> None:
        pass

    def list_loras(self) -> set[int]:
        return set()

    def shutdown(self) -> None:
        """Withdraw the series."""
        if self._files is not None:
            self._files.close()
            self._files = None


class _StepOutput(AsyncModelRunnerOutput):
    """The output of a step that may still be running."""

    def __init__(self, worker: EmulatedGpuWorker, output: ModelRunnerOutput, end: float) -> None:
        self._worker = worker
        self._output = output
        self._end = end

    def get_output(self) -> ModelRunnerOutput:
        """Wait until the step has ended, as for a device."""
        remaining_s = self._end - time.monotonic()
        if remaining_s > 0.0:
            time.sleep(remaining_s)
        self._worker.handed_over(self._end)
        return self._output

    def get_kv_connector_output(self) -> None:
        """Abstract since vLLM 0.33."""
        return None
