"""The scheduler classes that vLLM's own tests are run against.

Requests of those tests carry no workflow metadata, so the classes as they ship leave everything
to vLLM. `ordered` has the package's queues and pre-pass in place from the first request on, with
the ranks that vLLM uses, so that any difference is an error of theirs. The mutants are such
errors: tests that do not notice them would prove nothing.
"""

import itertools
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_workflow.engine.scheduler import WorkflowMixin


class Ordered(WorkflowMixin):
    """Queues and pre-pass always on; ranks as vLLM ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        order = self._order
        assert order is not None
        order.calls.key = self.waiting_key  # type: ignore[method-assign]
        order.calls.rank = self.running_rank  # type: ignore[method-assign]
        order._deactivate = lambda: None  # type: ignore[method-assign]
        order.activate()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self._order is not None:
            self._order._is_running_sorted = False
        output = super().schedule(*args, **kwargs)
        assert self._order is None or self._order.stats.failures == 0
        return output

    def waiting_key(self, request: Any) -> tuple[Any, ...]:
        if self.policy == SchedulingPolicy.PRIORITY:  # type: ignore[attr-defined]
            return (request.priority, request.arrival_time, request.request_id)
        return (0.0,)

    def running_rank(self, request: Any) -> tuple[Any, ...]:
        return (0.0,)


class LastInFirstOut(Ordered):
    """Turns the order of the queue round."""

    _countdown = itertools.count(0, -1)

    def waiting_key(self, request: Any) -> tuple[Any, ...]:
        return (next(self._countdown),)


class KeepsBlocks(Ordered):
    """Forgets to free the KV blocks of a preempted request."""

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        free = self._free_request_blocks
        self._free_request_blocks = lambda request: None
        try:
            super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._free_request_blocks = free


class FirstVictim(Ordered):
    """Turns the order of the running requests round before each step."""

    _countdown = itertools.count(0, -1)

    def running_rank(self, request: Any) -> tuple[Any, ...]:
        return (next(self._countdown),)


class Variant:
    """A mixin, on both of vLLM's schedulers."""

    def __init__(self, mixin: type) -> None:
        self.sync = type(f"{mixin.__name__}Sync", (mixin, Scheduler), {})
        self.asynchronous = type(f"{mixin.__name__}Async", (mixin, AsyncScheduler), {})


shipped = Variant(WorkflowMixin)
ordered = Variant(Ordered)
last_in_first_out = Variant(LastInFirstOut)
keeps_blocks = Variant(KeepsBlocks)
first_victim = Variant(FirstVictim)
