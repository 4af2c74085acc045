"""Corrects the prefix index by what vLLM publishes of its KV cache (`--kv-events-config`).

A message that was lost may have told of blocks that are gone: then all that was known of blocks is
forgotten, and the index is what it is without events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter

from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.types import Outcome, StageRequest
from vllm_workflow.router.kv_blocks import Blocks
from vllm_workflow.router.upstreams import Upstreams

if TYPE_CHECKING:
    from zmq.asyncio import Context

LOOK_EVERY_S = 1.0
"""Between two looks at which instances there are."""
_GPU = "GPU"

Event = tuple[str, dict[str, Any]]
"""`BlockStored`, `BlockRemoved` or `AllBlocksCleared`, and its fields as vLLM names them."""


class Stream:
    """What one instance publishes, in order.

    Args:
        instance_id: Whose.
        dispatcher: Told what the instance holds no more.
        counter: Of events, by instance and kind.
    """

    def __init__(self, instance_id: str, dispatcher: Dispatcher, counter: Counter) -> None:
        self.blocks = Blocks()
        self._instance_id = instance_id
        self._dispatcher = dispatcher
        self._counter = counter
        self._next_sequence: int | None = None
        self._has_groups = False
        """Whether it has several KV caches, of layers of several kinds: where one of them drops
        a block, the prompt may still be cached."""

    def take(self, sequence: int, events: Iterable[Event]) -> None:
        """Take a message at once, see `follows` and `more`."""
        self.follows(sequence)
        self.more(events)

    def follows(self, sequence: int) -> None:
        """Begin with the message of a number; `more` gets its events."""
        expected = self._next_sequence
        self._next_sequence = sequence + 1
        if expected is not None and sequence < expected:
            self._cleared()  # by another process, whose cache was empty when it began
        elif expected is not None and sequence > expected:
            self._lost()

    def more(self, events: Iterable[Event]) -> int:
        """Take some events of a message; returns how many they were."""
        num_events = 0
        gone: list[int] = []
        try:
            for kind, event in events:
                num_events += 1
                self._count(kind)
                if kind == "AllBlocksCleared":
                    gone.clear()
                    self._cleared()
                else:
                    gone += self._block_event(kind, event)
        finally:
            self.evicted(gone)
        return num_events

    def unreadable(self, why: str = "unreadable") -> None:
        """Note a message that makes no sense, or is too large: what it told of is not known."""
        self._count(why)
        self._next_sequence = None
        self.blocks.lost()

    def evicted(self, pieces: Sequence[int]) -> None:
        """Tell the dispatcher of pieces of prompts that the instance holds no more."""
        if pieces:
            self._dispatcher.evict(self._instance_id, tuple(dict.fromkeys(pieces)))

    def _block_event(self, kind: str, event: dict[str, Any]) -> list[int]:
        if (event.get("medium") or _GPU) != _GPU:
            return []
        if event.get("group_idx") and not self._has_groups:
            self._has_groups = True
            self.blocks.lost()
        if self._has_groups:
            return []
        hashes = event["block_hashes"]
        if kind == "BlockRemoved":
            return self.blocks.removed(hashes)
        session_id = event.get("session_id")
        return self.blocks.stored(
            session_id if isinstance(session_id, str) else None,
            hashes,
            parent=event.get("parent_block_hash"),
            block_size=event["block_size"],
        )

    def _cleared(self) -> None:
        self.blocks.cleared()
        self._dispatcher.clear(self._instance_id)

    def _lost(self) -> None:
        self._count("lost")
        self.blocks.lost()

    def _count(self, kind: str) -> None:
        self._counter.labels(self._instance_id, kind).inc()


class KvEvents:
    """Follows every instance that has `kv_events`; owned by one event loop.

    Args:
        dispatcher: Told what instances hold no more.
        upstreams: The instances.
        registry: Gets a counter of events.
    """

    def __init__(
        self, dispatcher: Dispatcher, upstreams: Upstreams, registry: CollectorRegistry
    ) -> None:
        self._dispatcher = dispatcher
        self._upstreams = upstreams
        self._counter = Counter(
            "vllm_workflow:router_kv_events",
            "KV-cache events of instances by kind; lost: times that messages were missed; "
            "too_large, unreadable: messages that were dropped.",
            ("instance", "kind"),
            registry=registry,
        )
        self._followed: dict[str, tuple[str, Stream, asyncio.Task[None]]] = {}
        """Instance -> endpoint, what it publishes, and who reads it."""

    def sent(self, instance_id: str, request: StageRequest) -> None:
        """Note that a call goes to an instance."""
        if instance_id in self._followed:
            self._followed[instance_id][1].blocks.sent(request)

    def ended(self, outcome: Outcome) -> None:
        """Note how a call ended, after the dispatcher was told."""
        if outcome.instance_id in self._followed:
            stream = self._followed[outcome.instance_id][1]
            stream.evicted(stream.blocks.ended(outcome.request_id, outcome.num_prompt_tokens))

    async def run(self) -> None:
        """Follow until cancelled."""
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            context: Context | None = None
            while True:
                wanted = {
                    each.config.id: each.config.kv_events
                    for each in self._upstreams
                    if each.config.kv_events
                }
                if wanted and context is None:
                    from vllm_workflow.router import kv_wire

                    context = await stack.enter_async_context(kv_wire.connecting())
                if context is not None:
                    self._follow(wanted, context, tasks)
                await asyncio.sleep(LOOK_EVERY_S)

    def _follow(self, wanted: dict[str, str], context: Context, tasks: asyncio.TaskGroup) -> None:
        """Begin to follow instances that are new, and leave those that are gone."""
        from vllm_workflow.router import kv_wire

        for instance_id, (endpoint, _, task) in list(self._followed.items()):
            if wanted.get(instance_id) != endpoint:
                task.cancel()
                del self._followed[instance_id]
                if instance_id not in wanted:  # where pods come and go, names do too
                    self._counter.remove_by_labels({"instance": instance_id})
        for instance_id, endpoint in wanted.items():
            if instance_id not in self._followed:
                stream = Stream(instance_id, self._dispatcher, self._counter)
                reading = tasks.create_task(kv_wire.follow(context, endpoint, stream))
                self._followed[instance_id] = endpoint, stream, reading
