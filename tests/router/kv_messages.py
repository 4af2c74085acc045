"""What vLLM publishes of its KV cache, and a stream of it."""

from __future__ import annotations

from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter

from tests.builders import dispatcher, instance, outcome, stage_request
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.events import Event
from vllm_workflow.core.prefix import Chain, Segment
from vllm_workflow.router.kv_events import Stream
from vllm_workflow.router.kv_wire import read

SIZE = 16
HEAD: Chain = (Segment(1, 32), Segment(2, 32))
"""Two pieces of two blocks each, in a prompt of 80 tokens."""


def stored(session_id: str | None, *hashes: int, parent: int | None = None) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": [0] * SIZE * len(hashes),
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
        "session_id": session_id,
    }


def removed(*hashes: int, **fields: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **fields}


CLEARED = {"type": "AllBlocksCleared"}


def message(sequence: int, *events: object) -> list[bytes]:
    batch = [1.0, list(events), 0]
    return [b"", sequence.to_bytes(8, "big"), msgspec.msgpack.encode(batch)]


def a_stream(log: list[Event]) -> tuple[Stream, Dispatcher]:
    """One call has ended on instance `a`, and its blocks 10 to 14 were reported by message 0."""
    brain = dispatcher(instance("a"), record=log.append)
    counter = Counter("kv_events", "", ("instance", "kind"), registry=CollectorRegistry())
    stream = Stream("a", brain, counter)
    call = stage_request("r", num_prompt_tokens=80, prefix=HEAD)
    brain.submit(call, now=0.0)
    stream.blocks.sent(call)
    stream.take(*read(message(0, stored("r", 10, 11, 12, 13, 14))))
    brain.settle(outcome("r", "a", num_prompt_tokens=80))
    stream.blocks.ended("r", 80)
    return stream, brain


def num_cached(brain: Dispatcher) -> int:
    call = stage_request("probe", num_prompt_tokens=80, prefix=HEAD)
    (candidate,) = brain.fleet.candidates(call)
    return candidate.num_cached_tokens
