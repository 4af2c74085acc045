"""Keeps what a router has learned in its store, and gives it back to the next one."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.store import Store, StoreReader

KEEP_EVERY_S = 0.25
"""With what the store's writer adds, a killed router loses less than a second."""
_MAX_SHARE = 0.02
"""Of the event loop's time that may go into this: much that was learned is written less often."""
WORKFLOWS = "workflows"
SPEEDS = "speeds"
_logger = logging.getLogger(__name__)


class Keeper:
    """Writes down what a dispatcher learns.

    Args:
        dispatcher: Learns.
        store: Keeps.
    """

    def __init__(self, dispatcher: Dispatcher, store: Store) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._num_kept = dispatcher.num_settled

    def restore(self) -> None:
        """Begin with what is in the store; what cannot be used is left, and the log says so.

        To be called when the instances are there and before the first call.
        """
        try:
            with StoreReader(self._store.path) as reader:
                workflows, speeds = reader.learned(WORKFLOWS), reader.learned(SPEEDS)
            if workflows is not None:
                self._dispatcher.predictor.restore(workflows, source=str(self._store.path))
            if speeds is not None:
                self._restore_speeds(speeds.get("instances"))
        except ConfigError as e:
            _logger.error("store: what was learned is not used: %s", e)

    def _restore_speeds(self, instances: Any) -> None:
        if not isinstance(instances, dict):
            raise ConfigError(
                f"{self._store.path}: speeds: expected instances, got {instances!r:.80}"
            )
        for instance_id, speed in instances.items():
            try:
                self._dispatcher.restore_speed(
                    instance_id,
                    latency=str(speed["latency"]),
                    drift=float(speed["drift"]),
                    num_observed=int(speed["num_observed"]),
                    hit_share=float(speed["hit_share"]),
                )
            except (KeyError, TypeError, ValueError) as e:
                raise ConfigError(f"{self._store.path}: speeds: {instance_id}: {e!r}") from None

    async def run(self) -> None:
        """Keep what is new, now and then, until cancelled; then once more."""
        pause_s = KEEP_EVERY_S
        try:
            while True:
                await asyncio.sleep(pause_s)
                pause_s = max(KEEP_EVERY_S, self.keep() / _MAX_SHARE)
        finally:
            self.keep()

    def keep(self) -> float:
        """Hand what is new to the store; returns the seconds that it took."""
        if self._dispatcher.num_settled == self._num_kept:
            return 0.0
        begin = time.perf_counter()
        self._num_kept = self._dispatcher.num_settled
        self._store.keep(WORKFLOWS, self._dispatcher.predictor.learned.to_mapping())
        self._store.keep(SPEEDS, {"instances": self._dispatcher.fleet.speeds()})
        return time.perf_counter() - begin
