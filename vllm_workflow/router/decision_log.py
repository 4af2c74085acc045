"""The decision log: every event of the dispatcher as a line of JSON, enough for a replay."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.events import Event, to_json

_FLUSH_S = 0.5
_logger = logging.getLogger(__name__)


class DecisionLog:
    """Collects events in order and appends them to a file off the event loop.

    Raises:
        ConfigError: The file cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: list[Event] = []
        try:
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as e:
            raise ConfigError(f"decision_log: cannot append to {path}: {e.strerror}") from None

    def record(self, event: Event) -> None:
        """Take an event; it reaches the file with the next flush."""
        self._events.append(event)

    async def run(self) -> None:
        """Flush now and then until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            events, self._events = self._events, []
            writing = asyncio.ensure_future(asyncio.to_thread(self._append, events))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing  # a thread cannot be cancelled, and what follows must not overtake it
                raise

    def flush(self) -> None:
        """Write what is left; blocks, so for the end only."""
        events, self._events = self._events, []
        self._append(events)

    def _append(self, events: list[Event]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{to_json(event)}\n" for event in events)
        except OSError:
            _logger.exception("lost %d events of the decision log %s", len(events), self._path)
