"""Replays runs: each call is made when those that reveal it have ended.

Arrivals are open-loop: a run begins when it is due, however many others are still under way.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from vllm_workflow.bench.completions import Answer
from vllm_workflow.bench.identity import CallContext, label
from vllm_workflow.bench.records import CallRecord, RunRecord
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.run_state import announced_as_final
from vllm_workflow.sim.types import TraceCall, TraceRun

Send = Callable[[CallContext], Awaitable[Answer]]
"""Makes a call and waits for its answer. Instants of the answer are `time.monotonic()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run of the load."""

    run: TraceRun
    """With its arrival."""
    reference_s: float | None = None
    """Duration that SLO scales are multiples of."""


async def replay(
    runs: Sequence[PlannedRun],
    send: Send,
    *,
    id_prefix: str = "",
    max_concurrency: int | None = None,
    time_scale: float = 1.0,
    on_end: Callable[[RunRecord], None] = lambda record: None,
) -> list[RunRecord]:
    """Make all calls of all runs; return what became of them, in the order of `runs`.

    A failed call fails its run: calls beside it go on, those behind it are not made.

    Args:
        runs: What to replay.
        send: Makes one call.
        id_prefix: Before each run's id at the server.
        max_concurrency: Runs at a time; the others wait in the order of their arrival, and
            arrive when it is their turn. None for no limit.
        time_scale: The server runs so many times as fast as life. The trace is replayed as fast,
            what is promised of it shrinks as much; records are in seconds of life.
        on_end: Called as runs end.

    Raises:
        ConfigError: A run without an arrival.
    """
    clock = _Clock(time.monotonic(), time_scale)
    seats = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    tasks: list[asyncio.Task[RunRecord]] = []
    async with asyncio.TaskGroup() as group:
        for planned in sorted(runs, key=_arrival_s):
            await _until(clock.instant(_arrival_s(planned)))
            active = _ActiveRun(planned, send, id_prefix, clock)
            tasks.append(group.create_task(_seated(active, seats, on_end)))
    records = {task.result().run_id: task.result() for task in tasks}
    return [records[planned.run.run_id] for planned in runs]


@dataclass(frozen=True, slots=True)
class _Clock:
    """Between seconds of life since the load began and this process's monotonic clock."""

    begun: float
    scale: float

    def instant(self, life_s: float) -> float:
        return self.begun + life_s / self.scale

    def life_s(self, instant: float) -> float:
        return (instant - self.begun) * self.scale


def _arrival_s(planned: PlannedRun) -> float:
    if planned.run.arrival_s is None:
        raise ConfigError(f"run {planned.run.run_id!r}: expected an arrival, got none")
    return planned.run.arrival_s


async def _until(instant: float) -> None:
    delay_s = instant - time.monotonic()
    if delay_s > 0:
        await asyncio.sleep(delay_s)


async def _seated(
    active: _ActiveRun, seats: asyncio.Semaphore | None, on_end: Callable[[RunRecord], None]
) -> RunRecord:
    async with AsyncExitStack() as stack:
        if seats is not None:
            if seats.locked():
                await stack.enter_async_context(seats)
                active.arrive_now()
            else:
                await stack.enter_async_context(seats)
        record = await active.run()
    on_end(record)
    return record


class _ActiveRun:
    """A run under way: what of it has been revealed."""

    def __init__(self, planned: PlannedRun, send: Send, id_prefix: str, clock: _Clock) -> None:
        self._planned = planned
        self._trace = planned.run
        self._send = send
        self._clock = clock
        self._workflow_id = label(id_prefix + planned.run.run_id)
        self._arrival = clock.instant(_arrival_s(planned))
        self._records: list[CallRecord] = []
        self._failed = False
        self._missing = {call.call_id: len(call.after) for call in self._trace.calls}
        self._then: dict[str, list[TraceCall]] = {}
        for call in self._trace.calls:
            for before in call.after:
                self._then.setdefault(before, []).append(call)
        self._final = announced_as_final(planned.run, self._then) if planned.run.calls else ""

    def arrive_now(self) -> None:
        """Count the run's time from now on: it had to wait for its place."""
        self._arrival = time.monotonic()

    async def run(self) -> RunRecord:
        async with asyncio.TaskGroup() as group:
            for call in self._trace.calls:
                if not call.after:
                    group.create_task(self._make(call, self._due(self._arrival, call), group))
        arrival_s = self._clock.life_s(self._arrival)
        return RunRecord(
            run_id=self._trace.run_id,
            workflow=self._trace.workflow,
            tenant=self._trace.tenant,
            arrival_s=arrival_s,
            end_s=max((c.end_s for c in self._records), default=arrival_s),
            slo_s=self._trace.slo_s,
            reference_s=self._planned.reference_s,
            num_calls=len(self._trace.calls),
            calls=tuple(self._records),
        )

    async def _make(self, call: TraceCall, planned_time: float, group: asyncio.TaskGroup) -> None:
        await _until(planned_time)
        answer = await self._send(self._context(call))
        self._records.append(self._record(call, planned_time, answer))
        if answer.error:
            self._failed = True
        for following in self._then.get(call.call_id, ()):
            self._missing[following.call_id] -= 1
            if self._missing[following.call_id] == 0 and not self._failed:
                due = self._due(answer.end_time, following)
                group.create_task(self._make(following, due, group))

    def _due(self, revealed: float, call: TraceCall) -> float:
        return revealed + call.gap_s / self._clock.scale

    def _context(self, call: TraceCall) -> CallContext:
        slo_s = None if self._trace.slo_s is None else self._trace.slo_s / self._clock.scale
        return CallContext(
            run=self._trace,
            call=call,
            workflow_id=self._workflow_id,
            slo_s=slo_s,
            budget_s=None if slo_s is None else slo_s - (time.monotonic() - self._arrival),
            final=call.call_id == self._final,
        )

    def _record(self, call: TraceCall, planned_time: float, answer: Answer) -> CallRecord:
        life_s = self._clock.life_s
        times = array("d", map(life_s, answer.token_times))  # a load may have millions
        prompt, output = answer.num_prompt_tokens, answer.num_output_tokens
        return CallRecord(
            run_id=self._trace.run_id,
            call_id=call.call_id,
            stage=call.stage,
            planned_s=life_s(planned_time),
            sent_s=life_s(answer.sent_time),
            first_token_s=times[0] if times else None,
            end_s=life_s(answer.end_time),
            token_times_s=times,
            num_prompt_tokens=prompt,
            num_output_tokens=output,
            num_cached_tokens=answer.num_cached_tokens,
            instance=answer.instance,
            status=answer.status,
            error=answer.error,
            has_trace_lengths=prompt in {None, max(1, call.num_prompt_tokens)}
            and output in {None, max(1, call.num_output_tokens)},
        )
