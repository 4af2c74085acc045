"""Who is told of every event of the dispatcher, and what of it outlives the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_workflow.core.events import Record
from vllm_workflow.router.board import Board
from vllm_workflow.router.config import RouterConfig
from vllm_workflow.router.decision_log import DecisionLog
from vllm_workflow.router.recorder import recorder
from vllm_workflow.router.store import Store

if TYPE_CHECKING:
    from vllm_workflow.router.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Records:
    """Each is None where the configuration has none."""

    log: DecisionLog | None
    store: Store | None
    board: Board | None
    tracing: Tracing | None
    record: Record | None
    """To be told of events; tells all of them."""


@asynccontextmanager
async def recording(config: RouterConfig) -> AsyncIterator[Records]:
    """Keep records while the block runs; then write what is left.

    Raises:
        ConfigError: A file cannot be written.
    """
    log = DecisionLog(Path(config.decision_log)) if config.decision_log else None
    store = Store(Path(config.store.path), config.store.retention) if config.store else None
    board = Board() if config.dashboard else None
    async with AsyncExitStack() as stack:
        if store:
            stack.push_async_callback(asyncio.to_thread, store.close)
        if log:
            stack.callback(log.flush)
        tracing = config.tracing.build() if config.tracing else None
        if tracing:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        watching = [each.record for each in (log, board, tracing) if each is not None]
        yield Records(log, store, board, tracing, recorder(watching, store, config.store))
