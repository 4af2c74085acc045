"""Which GPU is emulated: five flags of `vllm serve`, known in every process of the server.

vLLM chooses its platform when somebody first asks for it, which is before the command line is
parsed, and again in each child process. So the first process reads its own `sys.argv`, and hands
the result on in an environment variable.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.hardware import WEIGHT_BITS, Gpu
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile

SETTINGS_ENV = "_VLLM_WORKFLOW_EMULATION"
"""Settings as JSON, for the children of the process that parsed the flags."""
PROFILE_UTILIZATION = 0.9
"""`--gpu-memory-utilization` that the KV blocks of profiles are counted for, and its default
beside `--emulate-gpu`."""

FLAGS: dict[str, dict[str, Any]] = {
    "--emulate-gpu": {
        "metavar": "NAME|PROFILE.json",
        "help": "Emulate this GPU: nothing is computed, each step takes the time that the GPU "
        "would take, and KV blocks are as many as its memory holds. MODEL needs a config.json and "
        "a tokenizer, no weights (`vllm-workflow emulated-model` writes such a folder). A name "
        f"from {', '.join(catalogue.gpu_names())}, or a file that `vllm-workflow profile` wrote.",
    },
    "--emulate-model-shape": {
        "metavar": "NAME",
        "help": "With --emulate-gpu NAME: the model whose step time and memory are emulated, one "
        f"of {', '.join(catalogue.shape_names())}. A profile file says it itself.",
    },
    "--emulate-weight-bits": {
        "metavar": "{4,8,16}",
        "default": "16",
        "help": "With --emulate-gpu NAME: bits of one weight; fewer are read faster and leave "
        "more room for the KV cache.",
    },
    "--emulate-tp": {
        "metavar": "N",
        "default": "1",
        "help": "With --emulate-gpu NAME: this many such GPUs hold the model together, by tensor "
        "parallelism. vLLM's own --tensor-parallel-size stays 1.",
    },
    "--emulate-time-scale": {
        "metavar": "X",
        "default": "1",
        "help": "With --emulate-gpu: run X times as fast as life. 2: steps take half as long as on "
        "the GPU; 0.5: twice as long. Durations seen by clients are to be multiplied by X. How "
        "fast is too fast for this CPU, `vllm_workflow:emulated_late_seconds_total` and "
        "`…:emulated_stalled_seconds_total` on /metrics tell.",
    },
}
"""Flag -> what argparse is told about it."""


@dataclass(frozen=True, kw_only=True)
class EmulationSettings:
    """What the flags say, as text where they were given; see `FLAGS`."""

    gpu: str
    """Name in the catalogue, or path of a profile file."""
    model_shape: str | None = None
    weight_bits: str | None = None
    tp: str | None = None
    time_scale: str | None = None

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> EmulationSettings | None:
        """Find the flags in a command line; None without `--emulate-gpu` and its value."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for flag in FLAGS:
            parser.add_argument(flag)
        try:
            found, _ = parser.parse_known_args([_dashed(word) for word in argv])
        except argparse.ArgumentError:
            return None  # vLLM's own parser reads the same words and says what is wrong
        values = {name.removeprefix("emulate_"): value for name, value in vars(found).items()}
        return cls(**values) if values["gpu"] is not None else None

    @classmethod
    def from_environment(cls) -> EmulationSettings | None:
        """What a process before this one found in its command line."""
        text = os.environ.get(SETTINGS_ENV)
        return cls(**json.loads(text)) if text else None

    def to_environment(self, environment: MutableMapping[str, str]) -> None:
        """Hand the settings on to child processes."""
        environment[SETTINGS_ENV] = json.dumps(asdict(self))

    def check(self) -> None:
        """Check that all of it together makes a GPU.

        Raises:
            ConfigError: With the flag, what was there and what was wanted.
        """
        _ = self.scale
        self.num_kv_tokens(PROFILE_UTILIZATION)

    @cached_property
    def scale(self) -> float:
        """Times as fast as life."""
        if self.time_scale is None:
            return 1.0
        try:
            scale = float(self.time_scale)
        except ValueError:
            scale = math.nan
        if not 0.0 < scale < math.inf:
            raise ConfigError(
                f"--emulate-time-scale: expected a number above 0, got {self.time_scale!r}"
            )
        return scale

    @cached_property
    def profile(self) -> LatencyProfile:
        """How long steps take, and of what.

        Raises:
            ConfigError: Unknown names, an unreadable file, or a model that does not fit.
        """
        if self._is_file:
            for name in ("model_shape", "weight_bits", "tp"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--emulate-{name.replace('_', '-')}: expected only beside the name of a "
                        f"GPU; the profile {self.gpu} says it itself"
                    )
            return LatencyProfile.from_file(Path(self.gpu))
        if self.model_shape is None:
            raise ConfigError(
                f"--emulate-model-shape: missing beside --emulate-gpu {self.gpu}; "
                f"expected one of {catalogue.shape_names()}"
            )
        return catalogue.profile(
            self.gpu,
            self.model_shape,
            tp=_whole("--emulate-tp", self.tp or "1"),
            weight_bits=_whole("--emulate-weight-bits", self.weight_bits or "16", WEIGHT_BITS),
        )

    @property
    def device(self) -> Gpu | None:
        """The GPU of the catalogue; None for a profile of another one."""
        try:
            return catalogue.gpu(self.profile.gpu)
        except ConfigError:
            return None

    def num_kv_tokens(self, gpu_memory_utilization: float) -> int:
        """Tokens that the KV cache of the emulated GPU holds.

        Args:
            gpu_memory_utilization: Share of the memory that vLLM may use.

        Raises:
            ConfigError: The weights leave no room, or the profile does not tell.
        """
        profile = self.profile
        if profile.num_kv_tokens is not None and gpu_memory_utilization == PROFILE_UTILIZATION:
            return profile.num_kv_tokens
        try:
            deployment = catalogue.deployment(
                profile.gpu, profile.model_shape, tp=profile.tp, weight_bits=profile.weight_bits
            )
        except ConfigError as e:
            raise ConfigError(
                f"--emulate-gpu {self.gpu}: KV blocks at --gpu-memory-utilization "
                f"{gpu_memory_utilization}: the profile has none ({e}); expected num_kv_blocks and "
                f"block_size there, and no --gpu-memory-utilization"
            ) from None
        block_size = 16
        num_blocks = deployment.num_kv_blocks(
            gpu_memory_utilization=gpu_memory_utilization, block_size=block_size
        )
        return num_blocks * block_size

    @property
    def _is_file(self) -> bool:
        return self.gpu.endswith(".json") or os.sep in self.gpu


def _dashed(word: str) -> str:
    """A flag as vLLM's parser reads it: `_` in its name is `-`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _whole(flag: str, text: str, choices: Sequence[int] | None = None) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1 or (choices is not None and number not in choices):
        wanted = f"one of {tuple(choices)}" if choices else "a whole number from 1"
        raise ConfigError(f"{flag}: expected {wanted}, got {text!r}")
    return number


assert {f"--emulate-{f.name.replace('_', '-')}" for f in fields(EmulationSettings)} == set(FLAGS)
