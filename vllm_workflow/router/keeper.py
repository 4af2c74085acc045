"""Keeps what a router has learned in its store, and gives it back to the next one."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.learned import Learned
from vllm_workflow.router.store import Store, StoreReader, part_of

KEEP_EVERY_S = 0.25
"""With what the store's writer adds, a killed router loses less than a second."""
_MAX_KEEP_EVERY_S = 0.4
_MAX_SHARE = 0.02
"""Of the event loop's time that is to go into this: much that is learned is written less often."""
_AGAIN_S = 30.0
"""Until all that was learned is kept again, after a loss: a full disk stays full for long."""
_PARTS_AT_A_TIME = 32
"""Calls are let in between: about 2 ms."""
WORKFLOWS = "workflows"
SPEEDS = "speeds"
_ONLY = "tokens_per_byte"
"""The part of what was learned of workflows that is no list."""
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
        self._num_losses = 0
        """Of the store's, those after which everything was kept again."""
        self._again_at = 0.0

    def restore(self) -> None:
        """Begin with what is in the store; what cannot be used is left, and the log says so.

        To be called when the instances are there and before the first call.
        """
        try:
            with StoreReader(self._store.path) as reader:
                whole, speeds = reader.learned(WORKFLOWS), reader.learned(SPEEDS)
                parts = reader.learned_parts(WORKFLOWS)
            if whole is not None or parts:
                self._restore_workflows(whole, parts)
            if speeds is not None:
                self._restore_speeds(speeds.get("instances"))
        except ConfigError as e:
            _logger.error("store: what was learned is not used: %s", e)

    def _restore_workflows(
        self, whole: Mapping[str, Any] | None, parts: list[tuple[str, Mapping[str, Any]]]
    ) -> None:
        """Take over what was kept in parts, and before that in one piece by earlier versions.

        Raises:
            ConfigError: The piece cannot be used.
        """
        source, predictor = str(self._store.path), self._dispatcher.predictor
        if whole:
            predictor.restore(whole, source=source)
            self._store.keep(WORKFLOWS, {})
        data = predictor.learned.to_mapping()
        for name, part in parts:
            kind = name.partition("/")[0]
            if kind not in data:
                _logger.error("store: left out: %s: %s: unknown", source, name)
                continue
            row = part.get("row")
            try:
                Learned.from_mapping(_mapping_of(kind, row), source=f"{source}: {name}")
            except ConfigError as e:
                _logger.error("store: left out: %s", e)
                continue
            if kind == _ONLY:
                data[kind] = row
            else:
                data[kind].append(row)
        predictor.restore(data, source=source)
        if whole:
            predictor.learned.mark_changed()

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
        pause_s, news = KEEP_EVERY_S, self._news()
        try:
            while True:
                await asyncio.sleep(pause_s)
                took_s, begin, news = 0.0, time.perf_counter(), self._news()
                for number, part in enumerate(news):
                    self._store.keep(*part)
                    if number % _PARTS_AT_A_TIME == _PARTS_AT_A_TIME - 1:
                        took_s += time.perf_counter() - begin
                        await asyncio.sleep(0)
                        begin = time.perf_counter()
                took_s += time.perf_counter() - begin
                pause_s = min(max(KEEP_EVERY_S, took_s / _MAX_SHARE), _MAX_KEEP_EVERY_S)
        finally:
            for part in news:
                self._store.keep(*part)
            self.keep()

    def keep(self) -> None:
        """Hand what is new to the store."""
        self._again_at = 0.0
        for part in self._news():
            self._store.keep(*part)

    def _news(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield what has changed, or everything if the store has lost some of it: under which name
        it is kept, and what it is."""
        now, num_losses = time.monotonic(), self._store.num_losses
        if num_losses != self._num_losses and now >= self._again_at:
            self._num_losses, self._again_at = num_losses, now + _AGAIN_S
            self._dispatcher.predictor.learned.mark_changed()
        elif self._dispatcher.num_settled == self._num_kept:
            return
        self._num_kept = self._dispatcher.num_settled
        yield SPEEDS, {"instances": self._dispatcher.fleet.speeds()}
        for kind, row in self._dispatcher.predictor.learned.take_changed():
            key = "" if kind == _ONLY else json.dumps(row[:-1])
            yield part_of(WORKFLOWS, f"{kind}/{key}"), {"row": row}


def _mapping_of(kind: str, row: Any) -> dict[str, Any]:
    """Return what one row alone would be of `Learned.to_mapping`."""
    data = Learned().to_mapping()
    if kind == _ONLY:
        return data | {kind: row}
    return data | {kind: [row]}
