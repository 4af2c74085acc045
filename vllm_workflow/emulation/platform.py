"""An out-of-tree platform: vLLM takes this process for one with a GPU, and leaves everything on.

vLLM's own CPU platform switches asynchronous scheduling off, moves the worker into a process of
its own, and has other blocks and default limits. Here nothing of that is touched: limits are
those that vLLM chooses for a device of the GPU's name and memory.

Imported while `vllm.platforms` is being resolved, so nothing of `vllm.config` or `vllm.v1` can be
imported at the top.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.emulation.settings import PROFILE_UTILIZATION, EmulationSettings

WORKER = "vllm_workflow.emulation.worker.EmulatedGpuWorker"

logger = logging.getLogger("vllm.workflow")


class EmulatedGpuPlatform(Platform):
    """What vLLM asks about its device."""

    _enum = PlatformEnum.OOT
    device_name = "emulated_gpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Make the share of the memory that profiles are counted for the default."""
        if parser is not None:
            parser.set_defaults(gpu_memory_utilization=PROFILE_UTILIZATION)

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Name the worker. Called in the API process and again in the engine core.

        Raises:
            ConfigError: Settings that make no GPU, or a feature that is not emulated.
        """
        from vllm_workflow.emulation import compat

        compat.check()
        compat.check_config(vllm_config)
        settings = _settings()
        settings.check()
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = WORKER
        # There is nothing to compile, and no kernel to capture.
        from vllm.config import CompilationMode, CUDAGraphMode

        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        logger.warning(_WARNING, _described(settings))

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """Leave the block size at 16, or what the user chose: there is no attention backend."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        device = _settings().device
        return device.name if device is not None else _settings().gpu

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes, which vLLM chooses its default limits by; 0 for a GPU not in the catalogue."""
        device = _settings().device
        return int(device.memory_gib * 2**30) if device is not None else 0

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        return 0.0

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Refuse what only a model could answer, by HTTP 400.

        Raises:
            VLLMValidationError: The request asks for probabilities.
        """
        from vllm.exceptions import VLLMValidationError

        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name, None) is not None:
                raise VLLMValidationError(
                    f"{name}: an emulated GPU (--emulate-gpu) computes no probabilities"
                )

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: Any) -> None:
        pass

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        pass

    @classmethod
    def import_kernels(cls) -> None:
        pass

    @classmethod
    def check_if_supports_dtype(cls, dtype: Any) -> None:
        pass


_WARNING = (
    "\n*** EMULATED GPU: NO MODEL IS RUNNING ***\n"
    "%s. Answers are made up; only their timing means something.\n"
    "*** EMULATED GPU: NO MODEL IS RUNNING ***"
)


def _settings() -> EmulationSettings:
    settings = EmulationSettings.from_environment()
    if settings is None:
        raise ConfigError("emulated GPU: no settings; start the server with --emulate-gpu")
    return settings


def _described(settings: EmulationSettings) -> str:
    profile = settings.profile
    scale = f"{settings.scale:g} x as fast as life" if settings.scale != 1.0 else "at real speed"
    return (
        f"Steps take the time of {profile.model_shape or 'an unnamed model'} at "
        f"{profile.weight_bits} bits on {profile.tp} x {profile.gpu or settings.gpu}, {scale} "
        f"({profile.source})"
    )
