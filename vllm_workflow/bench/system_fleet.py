"""Level 3: a fleet of real `vllm serve` processes whose GPUs are emulated."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import aiohttp

from vllm_workflow.bench.compare_jobs import Setup
from vllm_workflow.bench.system_words import write_word_model
from vllm_workflow.cluster.process import ManagedProcess, as_json, http_get
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import UpstreamError
from vllm_workflow.emulation.model_dir import MAX_MODEL_LEN
from vllm_workflow.profiles import catalogue
from vllm_workflow.sim.fleet import InstanceSpec, SimInstance, build_fleet, specs_of

HOST = "127.0.0.1"
STREAM_INTERVAL = 1000
"""Tokens per event of a stream after the first: the API processes' CPU time is for all of the
servers of one machine, and whole runs are measured, not gaps between tokens."""
NUM_LOADING = 2
"""Servers that load at a time."""
_POLICY_TIMES = (
    *("patience_s", "late_patience_s", "urgent_slack_s"),
    *("preempt_margin_s", "preempt_cooldown_s", "preempt_waste_s"),
)
_START_TIMEOUT_S = 600.0
_RESET_TIMEOUT = aiohttp.ClientTimeout(total=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedInstance:
    """One server: what is emulated, and what a simulation takes it for."""

    spec: InstanceSpec
    sim: SimInstance

    @property
    def instance_id(self) -> str:
        return self.sim.instance.instance_id

    @property
    def max_model_len(self) -> int:
        """Longest context: what the KV cache of this instance holds, at most the model's."""
        usable_tokens = (self.sim.num_kv_blocks - 1) * self.sim.block_size
        return min(MAX_MODEL_LEN, usable_tokens)


def emulated_instances(setup: Setup) -> tuple[EmulatedInstance, ...]:
    """Return the instances of a fleet; the same that `Setup.build_fleet` gives a simulation.

    Raises:
        ConfigError: See `fleet_of`.
    """
    specs = specs_of(
        setup.fleet,
        model_shape=setup.model_shape,
        tp=setup.tp,
        weight_bits=setup.weight_bits,
        gpu_memory_utilization=setup.gpu_memory_utilization,
    )
    single = [replace(spec, count=1) for spec in specs for _ in range(spec.count)]
    return tuple(
        EmulatedInstance(spec=spec, sim=sim)
        for spec, sim in zip(single, build_fleet(specs), strict=True)
    )


def scaled_policy(policy: PolicyConfig, time_scale: float) -> PolicyConfig:
    """Return a policy whose durations are of a world that runs so many times as fast."""
    times = {name: getattr(policy, name) / time_scale for name in _POLICY_TIMES}
    return replace(policy, **times)


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def server_command(
    each: EmulatedInstance, model_dir: Path, port: int, *, time_scale: float, scheduler: str | None
) -> list[str]:
    """Return the command line of one server; `scheduler` None for vLLM's own."""
    spec = each.spec
    if spec.profile:
        emulated = ["--emulate-gpu", spec.profile]
    else:
        emulated = [
            *("--emulate-gpu", spec.gpu, "--emulate-model-shape", spec.model_shape),
            *("--emulate-weight-bits", str(spec.weight_bits), "--emulate-tp", str(spec.tp)),
        ]
    memory = ["--gpu-memory-utilization", str(spec.gpu_memory_utilization)]
    if spec.num_kv_blocks is not None:
        memory = ["--num-gpu-blocks-override", str(spec.num_kv_blocks)]
    return [
        *(sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.cli.main", "serve"),
        *(str(model_dir), "--host", HOST, "--port", str(port)),
        *("--served-model-name", spec.model_shape, "--generation-config", "vllm"),
        *emulated,
        *("--emulate-time-scale", f"{time_scale:g}"),
        *memory,
        *("--max-model-len", str(each.max_model_len), "--block-size", str(each.sim.block_size)),
        *("--max-num-seqs", str(spec.max_num_seqs)),
        *("--max-num-batched-tokens", str(spec.max_num_batched_tokens)),
        *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
        *("--stream-interval", str(STREAM_INTERVAL), "--disable-uvicorn-access-log"),
        *(("--scheduler", scheduler) if scheduler else ()),
    ]


class EmulatedFleet:
    """Servers that run while the context is entered; none outlives this process.

    Args:
        instances: What to start.
        policy: Of the engines, in seconds of life; None for stock vLLM.
        time_scale: See `replay`.
        folder: For model folders, policy and logs.
    """

    def __init__(
        self,
        instances: Sequence[EmulatedInstance],
        policy: PolicyConfig | None,
        *,
        time_scale: float,
        folder: Path,
    ) -> None:
        self.instances = tuple(instances)
        self.policy = policy
        self.time_scale = time_scale
        self._folder = folder
        self.version = ""
        """Of the servers' vLLM, once they run."""
        self._processes: list[ManagedProcess] = []

    @property
    def urls(self) -> list[str]:
        """Roots of the servers, in the order of the instances."""
        return [process.url for process in self._processes]

    async def __aenter__(self) -> EmulatedFleet:
        """Start all servers; return when all can be used.

        Raises:
            ProcessError: One did not start; those that did are ended again.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._processes = list(self._prepared())
        loading = asyncio.Semaphore(NUM_LOADING)
        try:
            async with asyncio.TaskGroup() as group:
                for process in self._processes:
                    group.create_task(_start(process, loading))
        except BaseException as e:
            await self._stop()
            if isinstance(e, BaseExceptionGroup):
                raise e.exceptions[0] from None
            raise
        _, body = await http_get(f"{self.urls[0]}/version")
        self.version = str((as_json(body) or {}).get("version", "unknown"))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    async def reset_prefix_caches(self) -> None:
        """Forget all blocks, so that no measurement finds what another one left.

        Raises:
            UpstreamError: A server did not.
        """
        async with aiohttp.ClientSession(timeout=_RESET_TIMEOUT) as session:
            for url in self.urls:
                try:
                    async with session.post(f"{url}/reset_prefix_cache") as response:
                        status = f"status {response.status}"
                except (aiohttp.ClientError, TimeoutError) as e:
                    status = f"{type(e).__name__}: {e}"
                if status != "status 200":
                    raise UpstreamError(
                        f"{url}/reset_prefix_cache: expected status 200, got {status}"
                    )

    def _prepared(self) -> Iterator[ManagedProcess]:
        environment = {**_ENVIRONMENT, **self._policy_environment()}
        scheduler = "workflow" if self.policy is not None else None
        for each, port in zip(self.instances, free_ports(len(self.instances)), strict=True):
            shape = each.spec.model_shape
            model_dir = self._folder / shape
            write_word_model(catalogue.shape(shape), model_dir)
            yield ManagedProcess(
                name=each.instance_id,
                command=server_command(
                    each, model_dir, port, time_scale=self.time_scale, scheduler=scheduler
                ),
                url=f"http://{HOST}:{port}",
                log_path=self._folder / f"{each.instance_id}.log",
                env=environment,
            )

    def _policy_environment(self) -> Mapping[str, str]:
        if self.policy is None:
            return {}
        path = self._folder / "policy.json"
        scaled = scaled_policy(self.policy, self.time_scale)
        path.write_text(scaled.to_json(), encoding="utf-8")
        return {"VLLM_WORKFLOW_POLICY": str(path.resolve())}

    async def _stop(self) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes))


_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache; the servers listen on loopback only
}


async def _start(process: ManagedProcess, loading: asyncio.Semaphore) -> None:
    async with loading:
        await process.start()
        await process.ready("/health", (200,), _START_TIMEOUT_S)
