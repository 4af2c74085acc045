"""Keeps one scheduler's waiting and running requests in the order of a policy.

Everything that the plug-in decides in vLLM's process is called through this class, and none of
its methods raises: an error here is logged once and counted, and vLLM's own order is used.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request, RequestStatus

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.engine import metadata
from vllm_workflow.engine.calls import LiveCall, LiveCalls
from vllm_workflow.engine.clock import Clock
from vllm_workflow.engine.compat import VllmShape
from vllm_workflow.engine.preemption import Preemption
from vllm_workflow.engine.queue import OrderedRequestQueue
from vllm_workflow.engine.stats import EngineStats, StatsPublisher

logger = logging.getLogger("vllm.workflow")

MAX_PUT_OFF = 64
"""Waiting requests that one step lets step back; if more became late at once, the next steps go
on, so that no step takes long for it."""
_ABORTED = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
P = ParamSpec("P")
T = TypeVar("T")


def _never_raises(
    method: Callable[Concatenate[SlackOrder, P], T],
) -> Callable[Concatenate[SlackOrder, P], T | None]:
    """Return None instead of raising, and report the first error in full."""

    def guarded(self: SlackOrder, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            self.stats.failures += 1
            if self.stats.failures == 1:
                logger.exception(
                    "vllm-workflow failed in %s and leaves this step to vLLM. "
                    "Further errors are only counted.",
                    method.__name__,
                )
            return None

    functools.update_wrapper(guarded, method)
    return guarded


class SlackOrder:
    """The plug-in's share in one scheduler."""

    def __init__(
        self,
        scheduler: Any,
        policy: PolicyConfig,
        shape: VllmShape,
        publisher: StatsPublisher | None,
        clock: Clock = time,
    ) -> None:
        self.policy = policy
        self.stats = EngineStats()
        self.is_active = False
        """A request with workflow metadata came since the engine was last empty."""
        self.prefill_cap = 0
        """Most tokens of one prefill chunk of a request with slack in this step; 0: no limit."""
        self._scheduler = scheduler
        self._shape = shape
        self._publisher = publisher
        self._clock = clock
        self._fingerprint = policy.fingerprint
        self._by_priority = scheduler.policy == SchedulingPolicy.PRIORITY
        self.calls = LiveCalls(policy, by_priority=self._by_priority)
        self._reorders = policy.preempt or policy.ordering != "fcfs"
        self._prefill_cap = self._usable_prefill_cap()
        self._preemption = self._usable_preemption()
        self._is_running_sorted = False
        self._prefills: deque[tuple[SchedulerOutput, int, float]] = deque(maxlen=8)
        """Steps under way with prompt tokens: how many, and when it was planned."""
        self._last_output_time = -math.inf

    @property
    def may_cap_prefills(self) -> bool:
        return self._prefill_cap > 0

    @property
    def owns_queues(self) -> bool:
        """Whether the waiting requests are in this package's queues, not in vLLM's."""
        return self.is_active and self._reorders

    @_never_raises
    def on_arrival(self, request: Request) -> None:
        """Take note of a request that vLLM is about to enqueue."""
        if self.is_active and not self._scheduler.requests:
            self._deactivate()
        if not self.is_active and not metadata.has_extra_args(request):
            return
        if request.request_id not in self._scheduler.requests:  # else: next turn of a session
            self._read(request)

    @_never_raises
    def on_session_update(self, request: Request) -> None:
        """Read the metadata of a session's next turn, and rank the session anew."""
        self._read(request)
        if self.owns_queues:
            for name in self._shape.queues:
                getattr(self._scheduler, name).rekey_request(request)
            self._is_running_sorted = False

    @_never_raises
    def on_leave(self, request: Request) -> None:
        """Forget a request that vLLM has just let go of."""
        call = self.calls.pop(request.request_id)
        if self._preemption is not None and request.status not in _ABORTED:
            self._preemption.costs.note_departure(self._clock.monotonic())
        if call is not None and call.request.has_deadline:
            if self._clock.time() > call.request.deadline:
                self.stats.deadline_missed += 1
            elif request.status not in _ABORTED:
                self.stats.deadline_met += 1
        if not self._scheduler.requests:
            # The engine makes no more steps now, so nothing else would show the last values.
            self.publish()

    @_never_raises
    def before_step(self) -> None:
        """Bring `running` into order and make room for urgent requests."""
        self.prefill_cap = 0
        if not self.owns_queues:
            return
        now = self._clock.time()
        s = self._scheduler
        if not self._is_running_sorted:
            s.running.sort(key=self.calls.rank)  # stable: without metadata nothing moves
            self._is_running_sorted = True
        self._put_off(now)
        if self._preemption is not None and s._pause_state == PauseState.UNPAUSED:
            self._preemption.make_room(now)
        if self._prefill_cap and self._is_urgent_one_present(now):
            self.prefill_cap = self._prefill_cap

    @_never_raises
    def after_step(self, output: SchedulerOutput) -> None:
        """Learn what vLLM made of the step."""
        s = self._scheduler
        if self.is_active:
            now = self._clock.time()
            for new in output.scheduled_new_reqs:
                self._on_admission(new.req_id, now)
            for request_id in output.scheduled_cached_reqs.resumed_req_ids:
                self._on_admission(request_id, now)
            if self._preemption is not None and self._reorders:
                has_budget = output.total_num_scheduled_tokens < s.max_num_scheduled_tokens
                self._preemption.note_step(now, has_token_budget=has_budget)
                self._note_prefill(output)
        if self._publisher is not None:
            self._count_waiting()
            self._publisher.publish_sometimes(self.stats, self._fingerprint)

    @_never_raises
    def on_output(self, output: SchedulerOutput) -> None:
        """Learn how long a step took that has just ended."""
        if self._preemption is None:
            return
        now = self._clock.monotonic()
        for index, (planned, num_tokens, plan_time) in enumerate(self._prefills):
            if planned is output:
                begun = max(plan_time, self._last_output_time)
                self._preemption.costs.note_prefill(now - begun, num_tokens)
                for _ in range(index + 1):
                    self._prefills.popleft()
                break
        self._last_output_time = now

    @_never_raises
    def limit_prefill(self, request: Request, num_new_tokens: int) -> int:
        """Tokens that a request may compute in this step while `prefill_cap` holds."""
        if num_new_tokens <= self.prefill_cap or request.has_encoder_inputs:
            return num_new_tokens
        if self.calls.of(request).is_urgent(self._clock.time(), self.policy.urgent_slack_s):
            return num_new_tokens
        self.stats.capped_prefills += 1
        return self.prefill_cap

    @_never_raises
    def publish(self) -> None:
        """Show the current statistics on `/metrics`."""
        if self._publisher is not None:
            self._count_waiting()
            self._publisher.publish(self.stats, self._fingerprint)

    @_never_raises
    def close(self) -> None:
        """Withdraw the statistics of an engine that ends."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def activate(self) -> None:
        """Put this package's queues in place of vLLM's, contents and order included."""
        self.is_active = True
        self._is_running_sorted = False
        if self._reorders:
            for name in self._shape.queues:
                stock = getattr(self._scheduler, name)
                setattr(self._scheduler, name, OrderedRequestQueue(self.calls.key, stock))

    def _deactivate(self) -> None:
        """Put vLLM's queues back in place of ours, which are empty."""
        self.is_active = False
        if self._reorders:
            for name in self._shape.queues:
                setattr(self._scheduler, name, create_request_queue(self._scheduler.policy))

    def _read(self, request: Request) -> None:
        reading = metadata.read(request)
        self.stats.unreadable_metadata += reading.num_unreadable
        if reading.is_workflow and not self.is_active:
            self.activate()
        if self.is_active:
            self.calls.add(reading.call)

    def _on_admission(self, request_id: str, now: float) -> None:
        self._is_running_sorted = False
        call = self.calls.get(request_id)
        if call is None:
            return
        if call.was_admitted:
            call.protected_until = self._clock.monotonic() + self.policy.preempt_cooldown_s
        elif call.request.has_deadline:
            self.stats.observe_slack(call.latest_start - call.late_s - now)
        call.was_admitted = True

    def _put_off(self, now: float) -> None:
        """Let the head of the queue be one that can still be on time, if there is any."""
        waiting: OrderedRequestQueue = self._scheduler.waiting
        for _ in range(min(MAX_PUT_OFF, len(waiting))):
            head = waiting.peek_request()
            if not self.calls.put_off(self.calls.of(head), now):
                break
            self.stats.put_off += 1
            waiting.rekey_request(head)

    def _note_prefill(self, output: SchedulerOutput) -> None:
        num_tokens = output.total_num_scheduled_tokens - len(output.num_scheduled_tokens)
        if num_tokens > 0 and output.scheduled_spec_decode_tokens:
            num_tokens -= sum(map(len, output.scheduled_spec_decode_tokens.values()))
        if num_tokens > 0:
            self._prefills.append((output, num_tokens, self._clock.monotonic()))

    def _is_urgent_one_present(self, now: float) -> bool:
        running, waiting = self._scheduler.running, self._scheduler.waiting
        # Sorted by rank, the most urgent comes first; by priority it may be any of them.
        most_urgent = running if self._by_priority else running[:1]
        calls: list[LiveCall] = [self.calls.of(request) for request in most_urgent]
        if waiting:
            calls.append(self.calls.of(waiting.peek_request()))
        return any(call.is_urgent(now, self.policy.urgent_slack_s) for call in calls)

    def _count_waiting(self) -> None:
        self.stats.queue_depth = sum(len(getattr(self._scheduler, n)) for n in self._shape.queues)

    def _usable_prefill_cap(self) -> int:
        """The cap of the policy where it does no harm, never below one decode with its drafts."""
        s, cap = self._scheduler, self.policy.prefill_chunk_cap
        if cap == 0:
            return 0
        if not self._shape.has_prefill_hook:
            why_not = "this vLLM has no hook for it (0.28 has)"
        elif not s.scheduler_config.enable_chunked_prefill:
            why_not = "chunked prefill is off"
        elif getattr(s, "need_mamba_block_aligned_split", False):
            why_not = "the model's state must be cached at block boundaries"
        else:
            return max(
                cap,
                1 + getattr(s, "num_spec_tokens", 0) + getattr(s, "num_prefill_lookahead", 0),
            )
        logger.warning("vllm-workflow: prefill_chunk_cap has no effect: %s", why_not)
        return 0

    def _usable_preemption(self) -> Preemption | None:
        if not self.policy.preempt:
            return None
        if getattr(self._scheduler, "defer_block_free", False):
            logger.warning(
                "vllm-workflow: preempt has no effect: with this KV connector, blocks of a "
                "preempted request are not free at once"
            )
            return None
        return Preemption(self._scheduler, self.policy, self.calls, self.stats, self._clock)
