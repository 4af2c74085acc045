"""Level 2: vLLM's own scheduler and KV-cache manager, in virtual time.

Everything that decides is vLLM's code, or this package's plug-in in it, in this process. What is
simulated is the model: a step takes what the `LatencyModel` says of its batch, and an answer
ends with the end-of-sequence token when it has its true length, which no scheduler can see: to
each of them a call may go on to the end of `max_model_len`.

The engine loop is vLLM's (`EngineCore.step`, and `step_with_batch_queue` for asynchronous
scheduling): with the latter, step n + 1 is planned when step n starts, so a call that arrives
then is computed in step n + 2 at the earliest, and a call that has ended takes part in one more
step. No clock of the machine is read, and equal calls at equal instants give equal events.

To import this module is to import vLLM, which takes seconds; do it where it is needed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError, WorkflowError
from vllm_workflow.core.handover import handover
from vllm_workflow.core.latency import LatencyModel, prefill_attention
from vllm_workflow.core.types import StageRequest
from vllm_workflow.engine.stats import EngineStats
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.prompts import EOS_TOKEN_ID, Prompt, Prompts
from vllm_workflow.sim.types import EngineEvent, EngineRequest, EventKind, SimEngine
from vllm_workflow.sim.vllm_scheduler import build_scheduler
from vllm_workflow.sim.vllm_server import VllmServer

IDLE_S = 0.001
"""What vLLM's engine core sleeps after a step in which nothing could be scheduled."""
MAX_EMPTY_STEPS = 100
"""Such steps in a row with nothing running after which an engine counts as stuck."""


class VirtualClock:
    """The clock of one simulated engine: `time.time()` and `time.monotonic()` alike."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@dataclass(slots=True)
class _Call:
    """One call between submission and its end."""

    request_id: str
    vllm_request: Request
    prompt: Prompt
    num_output_tokens: int
    num_cached_tokens: int = 0

    def next_token_id(self) -> int:
        is_last = self.vllm_request.num_output_tokens + 1 >= self.num_output_tokens
        return EOS_TOKEN_ID if is_last else self.prompt.own_token_id


@dataclass(frozen=True, slots=True)
class _Step:
    """A batch that was sent to the GPU."""

    output: SchedulerOutput
    samples: list[bool]
    """Per request of the batch, in its order, whether the step gives it a token."""
    end_time: float


class VllmEngine:
    """One vLLM server as a `SimEngine`."""

    def __init__(
        self,
        instance_id: str,
        latency: LatencyModel,
        server: VllmServer,
        *,
        schedule_s: float = 0.0,
    ) -> None:
        """Build vLLM's scheduler with an empty KV cache.

        Args:
            instance_id: Name of the instance, in errors too.
            latency: Time of each step on the GPU.
            server: What the server is started with.
            schedule_s: CPU time that planning one step takes before the GPU can start it; with
                asynchronous scheduling it overlaps with the step before.

        Raises:
            ConfigError: vLLM refuses `server`.
        """
        if not 0.0 <= schedule_s < math.inf:
            raise ConfigError(
                f"{instance_id}: schedule_s: expected a number from 0, got {schedule_s!r}"
            )
        self.instance_id = instance_id
        self.server = server
        self.num_steps = 0
        """Steps sent to the GPU so far."""
        self.num_prefill_tokens = 0
        """Tokens of prompts in those steps; of answers too, where a preempted call resumed."""
        self.num_decode_tokens = 0
        """Tokens decoded in those steps, also for calls that had just ended."""
        self.busy_s = 0.0
        """Duration of those steps."""
        self._latency = latency
        self._schedule_s = schedule_s
        self._clock = VirtualClock()
        self._scheduler = build_scheduler(instance_id, server, self._clock)
        self._prompts = Prompts(server.block_size)
        self._calls: dict[str, _Call] = {}
        """By the id that vLLM knows them by. As in vLLM's API server that is another one each
        time: a call that was aborted and comes again may still be in the step that runs."""
        self._vllm_ids: dict[str, str] = {}
        self._num_submitted = 0
        self._max_in_flight = 2 if server.async_scheduling else 1
        self._in_flight: deque[_Step] = deque()
        self._loop_time = 0.0
        """Instant from which the engine loop can do its next thing."""
        self._waits_for_output = False
        """The engine loop found nothing to schedule and blocks on the step that is running."""
        self._num_empty_steps = 0

    @property
    def stats(self) -> EngineStats | None:
        """What the workflow scheduler counted; None for vLLM's own."""
        order = getattr(self._scheduler, "_order", None)
        return None if order is None else order.stats

    @property
    def num_preempted_for_urgent(self) -> int:
        """Calls that lost their seat to an urgent one."""
        return 0 if self.stats is None else sum(self.stats.preemptions.values())

    @property
    def num_free_kv_blocks(self) -> int:
        """Blocks that no call holds; the prefix cache may still find them."""
        return int(self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def submit(self, request: EngineRequest, now: float) -> None:
        """Enqueue a call.

        Raises:
            ConfigError: The call could never end on this server. Nothing has changed.
            ValueError: `now` lies in the past, or the id is not new.
        """
        self._set_time(now)
        self.server.check(request, where=self.instance_id)
        request_id = request.request.request_id
        if request_id in self._vllm_ids:
            raise ValueError(f"{self.instance_id}: call {request_id!r} is already here")
        prompt = self._prompts.make(request)
        vllm_request = self._vllm_request(request, prompt, now)
        if not self._calls and not self._in_flight:
            self._loop_time = max(self._loop_time, now)
        vllm_id = vllm_request.request_id
        self._vllm_ids[request_id] = vllm_id
        self._calls[vllm_id] = _Call(request_id, vllm_request, prompt, request.num_output_tokens)
        self._scheduler.add_request(vllm_request)

    def abort(self, request_id: str, now: float) -> None:
        """Forget a call. A step that is running computes on for nobody."""
        self._set_time(now)
        vllm_id = self._vllm_ids.pop(request_id, None)
        if vllm_id is not None:
            del self._calls[vllm_id]
            self._scheduler.finish_requests(vllm_id, RequestStatus.FINISHED_ABORTED)
            self._wait_if_empty()

    def next_event_time(self) -> float:
        if self._may_schedule:
            return self._loop_time
        if self._in_flight:
            return max(self._loop_time, self._in_flight[0].end_time)
        return math.inf

    def advance(self, now: float) -> list[EngineEvent]:
        """Run the engine loop up to and including `now`.

        Raises:
            WorkflowError: vLLM schedules none of its requests any more.
        """
        events: list[EngineEvent] = []
        while (time := self.next_event_time()) <= now:
            self._set_time(time)
            if self._may_schedule:
                self._schedule(time)
            else:
                events += self._finish(self._in_flight.popleft(), time)
        self._set_time(now)
        return events

    @property
    def _may_schedule(self) -> bool:
        return (
            bool(self._calls)
            and not self._waits_for_output
            and len(self._in_flight) < self._max_in_flight
        )

    def _set_time(self, now: float) -> None:
        if not self._clock.now <= now < math.inf:
            raise ValueError(
                f"{self.instance_id}: expected a finite instant from {self._clock.now!r} on, "
                f"got {now!r}"
            )
        self._clock.now = now

    def _schedule(self, now: float) -> None:
        """Plan one step, and send it to the GPU behind the one that runs."""
        output = self._scheduler.schedule()
        if not output.num_scheduled_tokens:
            self._wait_or_retry(now)
            return
        self._num_empty_steps = 0
        self._loop_time = now + self._schedule_s
        step_s, samples = self._cost(output)
        start_time = self._loop_time
        if self._in_flight:
            start_time = max(start_time, self._in_flight[-1].end_time)
        self._in_flight.append(_Step(output, samples, start_time + step_s))
        self.num_steps += 1
        self.busy_s += step_s

    def _wait_or_retry(self, now: float) -> None:
        if self._in_flight:
            self._waits_for_output = True
            return
        self._num_empty_steps += 1
        if self._num_empty_steps > MAX_EMPTY_STEPS:
            raise WorkflowError(
                f"{self.instance_id}: vLLM schedules none of {len(self._calls)} calls at "
                f"{now:.6f} s although nothing runs"
            )
        self._loop_time = now + IDLE_S

    def _cost(self, output: SchedulerOutput) -> tuple[float, list[bool]]:
        """Seconds of a step that has just been planned, and which requests it gives a token.

        A token attends to itself and all before it. Tokens computed again after a preemption
        are prefill, those of the answer too.
        """
        requests = self._scheduler.requests
        num_prefill_tokens = num_decode_seqs = num_kv_tokens = 0
        attention = 0.0
        samples: list[bool] = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            num_computed = request.num_computed_tokens  # this step's included
            if num_tokens == 1 and num_computed > request.num_prompt_tokens:
                num_decode_seqs += 1
                num_kv_tokens += num_computed
            else:
                num_prefill_tokens += num_tokens
                attention += prefill_attention(num_tokens, num_computed - num_tokens)
            samples.append(not request.is_prefill_chunk)
        self.num_prefill_tokens += num_prefill_tokens
        self.num_decode_tokens += num_decode_seqs
        step_s = self._latency.step_s(
            num_prefill_tokens=num_prefill_tokens,
            num_decode_seqs=num_decode_seqs,
            num_kv_tokens=num_kv_tokens,
            prefill_attention=attention,
        )
        return step_s, samples

    def _finish(self, step: _Step, now: float) -> list[EngineEvent]:
        """Give vLLM the tokens of a step that has ended."""
        request_ids = list(step.output.num_scheduled_tokens)
        tokens: list[list[int]] = []
        for request_id, gives_token in zip(request_ids, step.samples, strict=True):
            call = self._calls.get(request_id) if gives_token else None
            tokens.append([] if call is None else [call.next_token_id()])
        outputs = self._scheduler.update_from_output(
            step.output,
            ModelRunnerOutput(
                req_ids=request_ids,
                req_id_to_index={r: i for i, r in enumerate(request_ids)},
                sampled_token_ids=tokens,
            ),
        )
        events = [
            event
            for of_client in outputs.values()
            for output in of_client.outputs
            if output.prefill_stats is not None or output.finish_reason is not None
            for event in self._events(output, now)
        ]
        self._loop_time = max(self._loop_time, now)
        self._waits_for_output = False
        self._wait_if_empty()
        return events

    def _wait_if_empty(self) -> None:
        """With no call left, the loop collects what runs for nobody before it goes idle."""
        if not self._calls:
            self._waits_for_output = bool(self._in_flight)

    def _events(self, output: Any, now: float) -> Iterator[EngineEvent]:
        """What the client of one request notices of a token: its first, its last, or both."""
        call = self._calls[output.request_id]
        kinds: list[EventKind] = []
        if output.prefill_stats is not None:  # vLLM sends them with the first token
            call.num_cached_tokens = output.prefill_stats.num_cached_tokens
            kinds.append(EventKind.FIRST_TOKEN)
        if output.finish_reason is not None:
            del self._calls[output.request_id], self._vllm_ids[call.request_id]
            kinds.append(EventKind.FINISHED)
        for kind in kinds:
            yield EngineEvent(
                time=now,
                request_id=call.request_id,
                kind=kind,
                num_cached_tokens=call.num_cached_tokens,
                num_preemptions=call.vllm_request.num_preemptions,
            )

    def _vllm_request(self, call: EngineRequest, prompt: Prompt, now: float) -> Request:
        params = SamplingParams(
            # Not the true length: a scheduler could read it.
            max_tokens=self.server.max_model_len - call.num_prompt_tokens,
            extra_args=workflow_xargs(call.request, now) or None,
        )
        params.update_from_generation_config({}, EOS_TOKEN_ID)
        self._num_submitted += 1
        return Request(
            request_id=f"{call.request.request_id}-{self._num_submitted}",
            prompt_token_ids=prompt.token_ids,
            sampling_params=params,
            pooling_params=None,
            arrival_time=now,
            priority=call.request.priority,
            block_hasher=prompt.hash_blocks,
        )


def vllm_engine(instance: SimInstance, policy: PolicyConfig) -> SimEngine:
    """Make a level 2 engine: what `simulate(engines=vllm_engine)` runs on."""
    return VllmEngine(
        instance.instance.instance_id,
        instance.latency,
        VllmServer(
            num_kv_blocks=instance.num_kv_blocks,
            max_model_len=(instance.num_kv_blocks - 1) * instance.block_size,
            block_size=instance.block_size,
            max_num_seqs=instance.instance.max_num_seqs,
            max_num_batched_tokens=int(instance.latency.max_num_batched_tokens),
            policy=policy,
        ),
    )


def workflow_xargs(request: StageRequest, now: float) -> dict[str, str | int]:
    """The `vllm_xargs` that the router would send at `now`; empty for an ordinary call."""
    names_run = request.workflow_id or request.workflow or request.stage
    if not (names_run or request.has_deadline or request.final):
        return {}
    labels = {
        "wf_id": request.workflow_id,
        "wf_name": request.workflow,
        "wf_stage": request.stage,
        "wf_tenant": request.tenant_id,
    }
    xargs: dict[str, str | int] = {name: label for name, label in labels.items() if label}
    xargs |= handover(request, service_s=request.service_s, now=now).xargs()
    if request.final:
        xargs["wf_final"] = 1
    return xargs
