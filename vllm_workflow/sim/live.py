"""One call inside the level 1 engine, and the waiting line."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Final

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.deadline import slack_s
from vllm_workflow.core.types import StageRequest
from vllm_workflow.sim.prefix_cache import BlockTable
from vllm_workflow.sim.types import EngineRequest

_INF: Final = math.inf


class LiveCall:
    """What the engine keeps of a call from `submit` to its end."""

    __slots__ = (
        "base",
        "chunk",
        "deadline",
        "finish_at",
        "is_aborted",
        "is_decoding",
        "is_put_off",
        "is_running",
        "key",
        "latest_start",
        "missed_step",
        "num_cached",
        "num_computed",
        "num_generated",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "num_seats_lost",
        "prefill_end",
        "protected_until",
        "rank",
        "request_id",
        "run_id",
        "table",
        "was_admitted",
    )

    def __init__(self, request: EngineRequest, table: BlockTable) -> None:
        self.request_id = request.request.request_id
        self.run_id = request.request.workflow_id or self.request_id
        self.deadline = request.request.deadline
        self.num_prompt = request.num_prompt_tokens
        self.num_output = max(1, request.num_output_tokens)
        self.table = table
        self.key = 0.0
        """Rank among the waiting calls."""
        self.latest_start = 0.0
        """Instant at which its slack is zero."""
        self.rank = 0.0
        """Place among the running calls; the last is the first to lose its blocks."""
        self.num_generated = 0
        """Output tokens; while it decodes, as of when that began."""
        self.prefill_end = self.num_prompt
        """Tokens to compute before the next output token; a preempted call computes its own
        output again."""
        self.num_computed = 0
        """Of them; while it decodes, see `base`."""
        self.chunk = 0
        """Tokens that the present step computes of its prefill."""
        self.base = 0
        """While it decodes: computed tokens minus the engine's count of decode steps."""
        self.finish_at = 0
        """While it decodes: count of decode steps at which it ends."""
        self.missed_step = -2
        """The last step, by the engine's count of decode steps, that it did not take part in."""
        self.num_cached = 0
        self.num_preemptions = 0
        self.num_seats_lost = 0
        """Preemptions in favour of a more urgent call."""
        self.protected_until = -_INF
        self.was_admitted = False
        self.is_running = False
        self.is_decoding = False
        self.is_aborted = False
        self.is_put_off = False

    def is_urgent(self, now: float, urgent_slack_s: float) -> bool:
        """Whether it has little slack and a deadline that is still ahead."""
        return now < self.deadline < _INF and self.latest_start - now < urgent_slack_s

    def urgent_from(self, now: float, urgent_slack_s: float) -> float:
        """Instant after which it will be urgent, for one that is not; `inf` for never."""
        if self.deadline <= now or self.deadline == _INF:
            return _INF
        return self.latest_start - urgent_slack_s

    def late_from(self) -> float:
        """Instant after which it misses its deadline even if it starts; `inf` without one."""
        if self.deadline == _INF:
            return _INF
        return self.deadline if self.was_admitted else self.latest_start


class Ranking:
    """Gives calls their places, as the engine plug-in does."""

    __slots__ = ("_by_slack", "_late_patience_s", "_ordering", "_patience_s", "reorders")

    def __init__(self, config: PolicyConfig) -> None:
        self._ordering = config.build_ordering()
        self._by_slack = config.preempt
        self._patience_s = config.patience_s
        self._late_patience_s = config.late_patience_s if config.ordering == "slack" else 0.0
        self.reorders = config.preempt or config.ordering != "fcfs"
        """False: vLLM's own order, in the queue and among the running."""

    def place(self, call: LiveCall, request: StageRequest) -> None:
        """Set what a call is ranked by, waiting and running."""
        key = self._ordering.key(request)
        call.key = request.arrival_time if math.isnan(key) else key
        call.latest_start = self._latest_start(request)
        call.rank = call.latest_start if self._by_slack else call.key

    def put_off_from(self, call: LiveCall) -> float:
        """Instant after which a call at the head of the queue goes behind those on time."""
        if not self._late_patience_s or call.is_put_off:
            return _INF
        return call.late_from()

    def put_off(self, call: LiveCall) -> None:
        """Give a waiting call the place that it has once it cannot be on time any more."""
        call.is_put_off = True
        call.latest_start += self._late_patience_s
        call.key += self._late_patience_s
        call.rank = call.latest_start if self._by_slack else call.key

    def _latest_start(self, request: StageRequest) -> float:
        deadline = request.deadline
        if deadline == _INF:
            deadline = request.arrival_time + self._patience_s
        return slack_s(
            deadline=deadline, now=0.0, finish_s=request.service_s, rest_s=request.rest_s
        )


class WaitingLine:
    """Smallest key first, first come first served among equals; a preempted call goes before
    its equals."""

    __slots__ = ("_back", "_front", "_heap", "places")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, LiveCall]] = []
        self.places: dict[str, int] = {}
        """Tie-breaker of each waiting call, by its id."""
        self._back = itertools.count()
        self._front = itertools.count(-1, -1)

    def append(self, call: LiveCall) -> None:
        self._push(call, next(self._back))

    def prepend(self, call: LiveCall) -> None:
        self._push(call, next(self._front))

    def head(self) -> LiveCall:
        heap = self._heap
        while not self._is_live(heap[0]):
            heapq.heappop(heap)
        return heap[0][2]

    def pop(self) -> None:
        """Take the head away."""
        del self.places[self.head().request_id]
        heapq.heappop(self._heap)

    def rekey(self, call: LiveCall) -> None:
        """Rank a waiting call anew; among its new equals it keeps its place."""
        self._push(call, self.places[call.request_id])

    def remove(self, call: LiveCall) -> None:
        self.places.pop(call.request_id, None)

    def first(self, n: int) -> list[LiveCall]:
        live = [e for e in self._heap if self._is_live(e)]
        return [entry[2] for entry in heapq.nsmallest(n, live)]

    def __len__(self) -> int:
        return len(self.places)

    def _is_live(self, entry: tuple[float, int, LiveCall]) -> bool:
        key, place, call = entry
        return self.places.get(call.request_id) == place and key == call.key

    def _push(self, call: LiveCall, place: int) -> None:
        self.places[call.request_id] = place
        heapq.heappush(self._heap, (call.key, place, call))
