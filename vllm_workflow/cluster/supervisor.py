"""Starts the processes of a cluster, watches them, and ends them together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import yaml

from vllm_workflow.cluster.config import ClusterConfig, InstanceConfig, executable
from vllm_workflow.cluster.process import ManagedProcess, ProcessError, as_json, http_get
from vllm_workflow.core.errors import ConfigError, WorkflowError

HOST = "127.0.0.1"
_ROUTER_START_S = 60.0
_TAKE_IN_S = 30.0
"""The router probes each instance every second."""
_QUIET_PORTS = range(20_000, 32_768)
"""Not given out by systems to whoever asks for any."""

Report = Callable[[str], None]


class Cluster:
    """Instances and router of one machine: `async with Cluster(config) as cluster`.

    Entering returns when the router sends calls to every instance; leaving ends every process
    and all that they started. An instance that dies in between is reported, not restarted.

    Args:
        config: What to start.
        report: Called with one line per event.
    """

    def __init__(self, config: ClusterConfig, report: Report | None = None) -> None:
        self.config = config
        self.instances: dict[str, ManagedProcess] = {}
        self._report: Report = report or (lambda line: None)
        self._start_time = time.monotonic()
        self._watchers: list[asyncio.Task[None]] = []
        self._router: ManagedProcess | None = None

    @property
    def router_url(self) -> str:
        """Root of the router; clients use `{router_url}/v1`."""
        assert self._router is not None
        return self._router.url

    @property
    def processes(self) -> list[ManagedProcess]:
        return [*([self._router] if self._router else []), *self.instances.values()]

    async def __aenter__(self) -> Cluster:
        """Start everything.

        Raises:
            ConfigError: A port is taken, or the command or its model is not there.
            ProcessError: A process ended or did not become ready; the rest is ended again.
        """
        self._prepare()
        try:
            await self._start()
        except BaseException as e:
            await self._stop()
            if isinstance(e, BaseExceptionGroup):
                raise _first(e) from None
            raise
        self._watchers = [asyncio.create_task(self._watch(p)) for p in self.instances.values()]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    async def wait(self) -> None:
        """Wait until the cluster is of no use any more.

        Raises:
            ProcessError: Always: the router has ended, or the last instance.
        """
        assert self._router is not None
        ended = asyncio.create_task(self._router.ended())
        all_ended = asyncio.create_task(asyncio.wait(self._watchers))
        try:
            await asyncio.wait([ended, all_ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            all_ended.cancel()
        if self._router.status is not None:
            raise ProcessError(await self._router.ended())
        raise ProcessError("every instance has ended; nothing is left to serve")

    def _prepare(self) -> None:
        """Find out what cannot work before anything is started."""
        config = self.config
        try:
            config.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"log_dir: cannot make {config.log_dir}: {e.strerror}") from None
        bound = [i.id for i in config.instances if i.cpus]
        if bound and not hasattr(os, "sched_setaffinity"):
            self._say(f"cpus: this system cannot bind {', '.join(bound)} to CPUs; going on without")
        elif missing := {c for i in config.instances for c in i.cpus or ()} - _cpus():
            raise ConfigError(f"cpus: {sorted(missing)} not among those allowed: {sorted(_cpus())}")
        taken: set[int] = set()
        router_port = _port(config.router.get("port", 8080), "router.port", taken)
        for n, instance in enumerate(config.instances):
            port = _port(instance.port, f"instances.{n}.port", taken)
            self.instances[instance.id] = self._instance(instance, port)
        self._router = self._router_process(router_port)

    def _instance(self, instance: InstanceConfig, port: int) -> ManagedProcess:
        config = self.config
        filled = {"{model}": config.model_of(instance), "{port}": str(port), "{id}": instance.id}
        words = config.words(instance)
        for name, value in filled.items():
            words = [word.replace(name, value) for word in words]
        env: dict[str, str] = {}
        if instance.cpus is not None:
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, instance.cpus))
        if instance.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, instance.gpus))
        return ManagedProcess(
            name=instance.id,
            command=[executable(words[0]), *words[1:]],
            url=f"http://{HOST}:{port}",
            log_path=config.log_dir / f"{instance.id}.log",
            env=env | config.env | instance.env,
            cpus=instance.cpus,
            nice=instance.nice,
            grace_s=config.stop_grace_s,
        )

    def _router_process(self, port: int) -> ManagedProcess:
        path = self.config.log_dir / "router.yaml"
        data = {"host": HOST, **self.config.router, "port": port}
        data["instances"] = [self._upstream(i) for i in self.config.instances]
        data.setdefault("shutdown_grace_s", self.config.stop_grace_s)
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        host = HOST if data["host"] in {"0.0.0.0", "::", ""} else data["host"]
        return ManagedProcess(
            name="router",
            command=[
                sys.executable,
                "-m",
                "vllm_workflow.cli.main",
                "router",
                "--config",
                str(path),
            ],
            url=f"http://{host}:{port}",
            log_path=self.config.log_dir / "router.log",
            grace_s=self.config.stop_grace_s,
        )

    def _upstream(self, instance: InstanceConfig) -> dict[str, Any]:
        fields = {
            "gpu": instance.gpu,
            "max_num_seqs": instance.max_num_seqs,
            "latency": dict(instance.latency),
        }
        given = {name: value for name, value in fields.items() if value}
        return {"id": instance.id, "url": self.instances[instance.id].url, **given}

    async def _start(self) -> None:
        """Start the router, whose mistakes show at once, then the instances a few at a time."""
        router = self._router
        assert router is not None
        await router.start()
        await router.ready("/health", (200, 503), _ROUTER_START_S)
        self._say_ready(router)
        seats = asyncio.Semaphore(self.config.start_parallel)
        async with asyncio.TaskGroup() as tasks:
            for process in self.instances.values():
                tasks.create_task(self._start_instance(process, seats))
        await self._taken_in(router)

    async def _start_instance(self, process: ManagedProcess, seats: asyncio.Semaphore) -> None:
        async with seats:
            await process.start()
            self._say(f"{process.name} loading: {process.log_path}")
            await process.ready("/health", (200,), self.config.start_timeout_s)
        self._say_ready(process)

    async def _taken_in(self, router: ManagedProcess) -> None:
        """Wait until the router knows that every instance is there.

        One with keys tells nobody about its instances, only that there is a healthy one.
        """
        give_up = time.monotonic() + _TAKE_IN_S
        while time.monotonic() < give_up and router.status is None:
            health = as_json((await http_get(router.url + "/health"))[1])
            if isinstance(health, dict) and all(
                health.get("instances", {"": health.get("healthy", False)}).values()
            ):
                return
            await asyncio.sleep(0.1)
        raise ProcessError(f"the router does not take in every instance: {router.reason()}")

    async def _watch(self, process: ManagedProcess) -> None:
        line = await process.ended()
        left = [p.name for p in self.instances.values() if p.status is None]
        self._say(f"{line}; the router goes on with {', '.join(left) or 'none'}")

    async def _stop(self) -> None:
        """End the router first, so that calls under way can end, then the instances."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        if self._router:
            await self._router.stop()
        await asyncio.gather(*(p.stop() for p in self.instances.values()))

    def _say_ready(self, process: ManagedProcess) -> None:
        self._say(f"{process.name} ready on {process.url}, after {process.elapsed_s:.1f} s")

    def _say(self, text: str) -> None:
        self._report(f"[{time.monotonic() - self._start_time:6.1f} s] {text}")


def _cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _port(port: Any, where: str, taken: set[int]) -> int:
    """Return a port that can be listened on, a free one for 0.

    Raises:
        ConfigError: Somebody listens there.
    """
    if type(port) is not int or not 0 <= port <= 65535:
        raise ConfigError(f"{where}: expected a port from 0 to 65535, got {port!r}")
    problem = "no port is free"
    # Of those that systems give to whoever asks for any, this one may be gone before it is used.
    tried = random.sample(_QUIET_PORTS, len(_QUIET_PORTS)) if port == 0 else [port]
    for number in tried:
        if port == 0 and number in taken:
            continue
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, number))
            except OSError as e:
                problem = f"cannot listen on {HOST}:{number}: {e.strerror}"
                continue
        taken.add(number)
        return number
    raise ConfigError(f"{where}: {problem}")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error of a group that says most."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            error = _first(error)
        if isinstance(error, WorkflowError):
            return error
    return group
