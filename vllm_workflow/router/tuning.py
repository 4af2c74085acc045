"""Online tuning: a process now and then that replays the last traffic, and a file that it writes.

The process is started anew for each tuning, runs when nothing else wants the processor, and is
done: what goes wrong in it is a line in the log here. What it finds becomes policy only by way
of `policy_file`, which anybody may write, and which is checked before it is taken over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Added, Event, Marked, Started, Swapped, to_json
from vllm_workflow.core.policy_names import name_of
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.router.binder import Binder
from vllm_workflow.router.metrics import Metrics
from vllm_workflow.router.store import Store
from vllm_workflow.router.tuner_config import TunerConfig

PROGRAM = "vllm_workflow.sim.tuner_process"
"""Named, not imported: the simulator lies above the router."""
WATCH_EVERY_S = 1.0
_MAX_ERROR_CHARS = 2000
_logger = logging.getLogger(__name__)

_Signature = tuple[int, int, int]
"""Inode, size and time of the last change: what tells one version of a file from the next."""


class PolicySwitch:
    """Lets another policy decide, between two decisions.

    Args:
        dispatcher: Whose policy it is.
        binder: Wakes the calls that can start under the new one.
        metrics: Shows which one is in force.
    """

    def __init__(self, dispatcher: Dispatcher, binder: Binder, metrics: Metrics) -> None:
        self.dispatcher = dispatcher
        self._binder = binder
        self.metrics = metrics
        self.first = dispatcher.config
        """That the router began with."""
        metrics.policy(dispatcher.config)

    @property
    def current(self) -> PolicyConfig:
        return self.dispatcher.config

    def swap(self, policy: PolicyConfig) -> bool:
        """Take over a policy; returns whether it is another one than before."""
        if policy == self.current:
            return False
        before = self.current
        self.dispatcher.swap(policy, now=time.monotonic())
        self._binder.poll()
        self.metrics.policy(policy)
        self.metrics.policy_swapped()
        _logger.info("policy %s in the place of %s", _told(policy), _told(before))
        return True


def _told(policy: PolicyConfig) -> str:
    return f"{name_of(policy)} {policy.fingerprint}"


class PolicyFile:
    """Takes over a `policy.json` whenever it changes; one that cannot be used changes nothing.

    Args:
        path: The file, which need not be there. What it holds already is not taken over.
        switch: Gets the policy.
        every_s: Between two looks at it.
    """

    def __init__(self, path: Path, switch: PolicySwitch, *, every_s: float = WATCH_EVERY_S) -> None:
        self._path = path
        self._switch = switch
        self._every_s = every_s
        self._seen = _signature(path)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.look()

    async def look(self) -> None:
        """Take over what is new. Whatever goes wrong is logged, and changes nothing."""
        try:
            await self._look()
        except Exception:
            _logger.exception("%s could not be taken over", self._path)

    async def _look(self) -> None:
        signature = await asyncio.to_thread(_signature, self._path)
        if signature == self._seen:
            return
        self._seen = signature
        if signature is None:
            return
        try:
            policy = await asyncio.to_thread(PolicyConfig.from_file, self._path)
        except ConfigError as e:
            _logger.error("%s; policy %s stays", e, self._switch.current.fingerprint)
            return
        self._switch.swap(policy)


class Tuning:
    """Starts a tuning process now and then; owned by one event loop.

    Args:
        config: How often, on what.
        log: The decision log, or the store that holds it.
        switch: Asked for what is in force, and what the router began with.
        file: Takes over what a tuning has written.
        workflows: Declared ones; if none, the tuner takes what it sees.
        store: Keeps the verdicts, if there is one.
    """

    def __init__(
        self,
        config: TunerConfig,
        log: Path,
        switch: PolicySwitch,
        file: PolicyFile,
        *,
        workflows: list[WorkflowProfile],
        store: Store | None,
    ) -> None:
        self._config = config
        self._log = log
        self._switch = switch
        self._file = file
        self._workflows = workflows
        self._store = store

    async def run(self) -> None:
        """Tune until cancelled."""
        while True:
            await asyncio.sleep(self._config.interval_s)
            await self.tune()

    async def tune(self) -> None:
        """Tune once. Whatever goes wrong is logged and counted, and changes nothing."""
        try:
            verdict = await self._ask(json.dumps(self._job()).encode())
        except (OSError, ValueError, TimeoutError) as e:
            self._switch.metrics.tuned("failed")
            _logger.error("tuning failed: %s", str(e) or f"took over {self._config.timeout_s:g} s")
            return
        self._switch.metrics.tuned("swap" if verdict["swap"] else "keep")
        _logger.info("tuning: %s", verdict["reason"])
        if self._store is not None:
            self._store.tuned(verdict)
        await self._file.look()

    async def _ask(self, job: bytes) -> dict[str, Any]:
        """Run the process; returns what it found.

        Raises:
            ValueError: It ended badly; with what it said.
            TimeoutError: It took too long.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            PROGRAM,
            str(self._config.nice),
            str(self._config.timeout_s),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self._config.timeout_s):
                out, error = await process.communicate(job)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            said = error.decode(errors="replace").strip()[-_MAX_ERROR_CHARS:]
            raise ValueError(f"exit status {process.returncode}: {said}")
        verdict = json.loads(out)
        if not isinstance(verdict, dict) or not {"swap", "reason"} <= verdict.keys():
            raise ValueError(f"expected a verdict, got {out[:200]!r}")
        return verdict

    def _job(self) -> dict[str, Any]:
        config = self._config
        return {
            "log": str(self._log),
            "state": [to_json(event) for event in self._state()],
            "workflows": [
                {
                    "name": workflow.name,
                    "stages": [
                        {
                            "name": stage.name,
                            "rounds": stage.rounds,
                            "prompt_tokens": stage.prompt_tokens,
                            "output_tokens": stage.output_tokens,
                        }
                        for stage in workflow.stages
                    ],
                }
                for workflow in self._workflows
            ],
            "settings": config.settings(),
            "grid": config.grid,
            "window_s": config.window_s,
            "max_runs": config.max_runs,
            "policy_file": config.policy_file,
            "history_file": config.history_file,
            "max_history": config.max_history,
        }

    def _state(self) -> list[Event]:
        """Return what is in force, as a log would tell it."""
        first, now = self._switch.first, self._switch.current
        fleet = self._switch.dispatcher.fleet
        ledger = self._switch.dispatcher.tenants
        tenants = None if ledger is None else ledger.config
        events: list[Event] = [
            Started(policy=first, fingerprint=first.fingerprint, tenants=tenants)
        ]
        for instance in fleet:
            events.append(Added(instance=instance))
            if not fleet.is_healthy(instance.instance_id):
                events.append(Marked(instance_id=instance.instance_id, healthy=False))
        events.append(Swapped(now=time.monotonic(), policy=now, fingerprint=now.fingerprint))
        return events


def _signature(path: Path) -> _Signature | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
