"""vLLM's scheduler, ordered by slack.

Until the first request with workflow metadata arrives, and again once the engine has been empty,
vLLM's own queues are in place and nothing here decides anything. In between, four things differ:

- waiting requests are ordered by the policy's key, frozen when they arrive; with
  `--scheduling-policy priority` by their priority first;
- a pre-pass before each step keeps `running` ordered by slack, so that the victim that vLLM
  itself takes (the last; with `priority`, vLLM's own choice) is the one with most slack, and
  preempts such a request when an urgent one finds no seat or no KV blocks;
- waiting requests that can no longer be on time go behind those that can;
- prefill chunks of requests with slack are capped while urgent ones are there, if asked for.

The step itself is vLLM's. All instants are on the clock of `Request.arrival_time`: `time.time()`,
or a simulation's.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_workflow.engine import compat
from vllm_workflow.engine.clock import Clock
from vllm_workflow.engine.policy import load_policy
from vllm_workflow.engine.slack_order import SlackOrder
from vllm_workflow.engine.stats import StatsPublisher
from vllm_workflow.vllm_metrics import engine_directory, engine_labels

logger = logging.getLogger("vllm.workflow")


class WorkflowMixin:
    """Hooks of a vLLM scheduler, each handed to its `SlackOrder`."""

    _order: SlackOrder | None = None  # None where vLLM's tests build a scheduler by __new__

    def __init__(self, *args: Any, clock: Clock = time, **kwargs: Any) -> None:
        """Check that everything needed is there, then build vLLM's scheduler.

        Args:
            args: As vLLM's scheduler takes them; so are `kwargs`.
            clock: A simulation's; vLLM itself never passes one.
            kwargs: See `args`.

        Raises:
            ConfigError: Unusable policy, unsupported model, or vLLM of unknown shape.
        """
        vllm_config = kwargs.get("vllm_config", args[0] if args else None)
        compat.check_class(type(self))
        compat.check_model(vllm_config)
        policy = load_policy(vllm_config)
        super().__init__(*args, **kwargs)
        publisher = _publisher(vllm_config) if getattr(self, "log_stats", False) else None
        self._order = SlackOrder(self, policy, compat.check_instance(self), publisher, clock)
        if self._order.may_cap_prefills:
            # vLLM asks for every request in every step, so it is in place only where needed.
            self._reserve_prefill_lookahead = self._capped_prefill
        self._order.publish()
        logger.info(
            "%s: policy %s, ordering by %s, preemption %s",
            type(self).__name__,
            policy.fingerprint,
            policy.ordering,
            "on" if policy.preempt else "off",
        )

    def add_request(self, request: Request) -> None:
        if self._order is not None:
            self._order.on_arrival(request)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._order is None:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._order.before_step()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._order.after_step(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        if self._order is not None:
            self._order.on_output(scheduler_output)
        return super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def shutdown(self) -> None:
        if self._order is not None:
            self._order.close()
        super().shutdown()  # type: ignore[misc]

    def _free_blocks(self, request: Request) -> None:
        """The last point at which vLLM knows a request."""
        super()._free_blocks(request)  # type: ignore[misc]
        if self._order is not None:
            self._order.on_leave(request)

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """A session's next turn brings its own sampling parameters and arrival time."""
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        if self._order is not None:
            self._order.on_session_update(session)

    def _capped_prefill(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Stands in for `_reserve_prefill_lookahead`: how much of a chunk runs in this step."""
        if self._order is not None and self._order.prefill_cap:
            num_new_tokens = self._order.limit_prefill(request, num_new_tokens) or num_new_tokens
        return super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )

    def _select_waiting_queue_for_scheduling(self) -> RequestQueue | None:
        """Up to vLLM 0.30: skipped requests wait in a queue of their own, and go first."""
        if self._order is None or not self._order.owns_queues:
            return super()._select_waiting_queue_for_scheduling()  # type: ignore[misc]
        queues = [q for q in (self.skipped_waiting, self.waiting) if q]  # type: ignore[attr-defined]
        key = self._order.calls.key
        return min(queues, key=lambda queue: key(queue.peek_request()), default=None)


class WorkflowSyncScheduler(WorkflowMixin, Scheduler):
    """For engines with `--no-async-scheduling`."""


class WorkflowScheduler(WorkflowMixin, AsyncScheduler):
    """What to name in `--scheduler-cls`.

    vLLM decides late whether an engine schedules asynchronously, and each mode needs its own
    base class, so making one of these for a synchronous engine gives a `WorkflowSyncScheduler`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        vllm_config = kwargs.get("vllm_config", args[0] if args else None)
        if cls is not WorkflowScheduler or vllm_config is None:
            return super().__new__(cls)
        if not vllm_config.scheduler_config.async_scheduling:
            return WorkflowSyncScheduler(*args, **kwargs)
        return super().__new__(cls)


def _publisher(vllm_config: Any) -> StatsPublisher | None:
    """Where this engine shows its statistics. Without metrics an engine still serves."""
    directory = engine_directory()
    if directory is None:
        logger.info("vllm-workflow metrics are off: start with --scheduler workflow to have them")
        return None
    try:
        return StatsPublisher(directory, engine_labels(vllm_config))
    except Exception as e:
        logger.warning("vllm-workflow metrics are off: %s: %s", type(e).__name__, e)
        return None
