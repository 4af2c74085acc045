"""The tuner as a part of the router that may be configured anew while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.store import Store
from vllm_workflow.router.tuning import PolicyFile, PolicySwitch, Tuning


class Tuner:
    """Tunes, and watches `policy_file`, as the configuration says; owned by one event loop.

    Args:
        config: As the router starts.
        switch: Gets the policies.
        store: Keeps the verdicts, if there is one.
    """

    def __init__(self, config: RouterConfig, switch: PolicySwitch, store: Store | None) -> None:
        self._config = config
        self._switch = switch
        self._store = store
        self._changed = asyncio.Event()

    def configure(self, config: RouterConfig) -> None:
        """Go by another configuration from now on; a tuning under way is given up."""
        self._config = config
        self._changed.set()

    async def run(self) -> None:
        """Tune until cancelled."""
        while True:
            self._changed.clear()
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(each) for each in self._parts()]
                await self._changed.wait()
                for task in running:
                    task.cancel()

    def _parts(self) -> list[Coroutine[Any, Any, None]]:
        """What runs now; nothing where tuning is switched off."""
        config = self._config
        if config.tuner is None or config.tuned_log is None:
            return []
        file = PolicyFile(Path(config.tuner.policy_file), self._switch)
        workflows = [workflow.build() for workflow in config.workflows]
        log = Path(config.tuned_log)
        tuning = Tuning(
            config.tuner, log, self._switch, file, workflows=workflows, store=self._store
        )
        return [file.run(), tuning.run()]
