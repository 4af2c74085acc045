"""The decision log: every event of the dispatcher as a line of JSON, enough for a replay."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, to_json

_FLUSH_S = 0.5
MAX_WAITING = 50_000
"""Events that may wait for a disk; those that come beyond it are dropped, and the log says so."""
_logger = logging.getLogger(__name__)


class DecisionLog:
    """Collects events in order and appends them to a file off the event loop.

    Raises:
        ConfigError: The file cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: list[Event] = []
        self.num_dropped = 0
        """Events that were not written: the disk was too slow, or failed."""
        self._num_told = 0
        """Of them, those that the log has told of."""
        try:
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as e:
            raise ConfigError(f"decision_log: cannot append to {path}: {e.strerror}") from None

    def record(self, event: Event) -> None:
        """Take an event; it reaches the file with the next flush."""
        if len(self._events) < MAX_WAITING:
            self._events.append(event)
        else:
            self.num_dropped += 1

    async def run(self) -> None:
        """Flush now and then until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            self._tell_dropped()
            events, self._events = self._events, []
            writing = asyncio.ensure_future(asyncio.to_thread(self._append, events))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing  # a thread cannot be cancelled, and what follows must not overtake it
                raise
            self._count_lost(writing.result())

    def flush(self) -> None:
        """Write what is left; blocks, so for the end only."""
        self._tell_dropped()
        events, self._events = self._events, []
        self._count_lost(self._append(events))

    def _tell_dropped(self) -> None:
        num_dropped = self.num_dropped - self._num_told
        if num_dropped:
            self._num_told = self.num_dropped
            _logger.error(
                "dropped %d events of the decision log %s: the disk is too slow; a replay of what "
                "follows is not of what was",
                num_dropped,
                self._path,
            )

    def _count_lost(self, num_events: int) -> None:
        self.num_dropped += num_events
        self._num_told += num_events

    def _append(self, events: list[Event]) -> int:
        """Write events; returns how many were lost, of which the log tells."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{to_json(event)}\n" for event in events)
        except OSError:
            _logger.exception("lost %d events of the decision log %s", len(events), self._path)
            return len(events)
        return 0
