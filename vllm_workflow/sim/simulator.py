"""Runs go through the router's dispatcher to engines in virtual time.

Every decision is made by `core.Dispatcher`, on what a router would know when it decides: calls
become known as those before them end, lengths as they are counted. True lengths reach the
engines only. The loop is the same whatever the engines are, see `SimEngine`.
"""

from __future__ import annotations

import gc
import math
import time as clock
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.dispatcher import Dispatcher
from vllm_workflow.core.errors import (
    ConfigError,
    NoInstanceError,
    OverloadedError,
    QuotaExceededError,
)
from vllm_workflow.core.events import Record
from vllm_workflow.core.fleet import Fleet
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.core.types import Decision, Outcome
from vllm_workflow.core.workflow import WorkflowProfile
from vllm_workflow.sim.fleet import EngineFactory, SimInstance, event_engine
from vllm_workflow.sim.hints import LengthHint, RestHint
from vllm_workflow.sim.kernel import Kernel
from vllm_workflow.sim.results import SimResult
from vllm_workflow.sim.run_state import (
    BYTES_PER_TOKEN,
    CallState,
    PromptHeads,
    RunState,
    call_result,
    run_result,
)
from vllm_workflow.sim.types import (
    EngineEvent,
    EventKind,
    SimEngine,
    TraceCall,
    TraceRun,
)

_INF: Final = math.inf

_MAX_TOKENS: Final = 2048
"""Clients bound every answer by this, or by a multiple of it that the longest one needs."""
_COLLECT_EVERY: Final = 200_000
"""Objects made and kept between two searches for cyclic garbage: what a simulation keeps is no
garbage, and looking at all of it again and again takes a tenth of the time."""
_FIRST: Final = 0
_THEN: Final = 1
_ENGINE: Final = 2
"""Priorities at one instant: outages, then calls, then steps, which see all calls of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """An instance is gone for a while: its calls are lost, its clients make them again."""

    instance_id: str
    start_s: float
    end_s: float = math.inf


def simulate(
    runs: Sequence[TraceRun],
    fleet: Sequence[SimInstance],
    policy: PolicyConfig | None = None,
    *,
    arrivals: Sequence[float] | None = None,
    engines: EngineFactory = event_engine,
    workflows: Iterable[WorkflowProfile] = (),
    hint: LengthHint | None = None,
    rest: RestHint | None = None,
    outages: Iterable[Outage] = (),
    until_s: float = math.inf,
    record: Record | None = None,
    time_decisions: bool = False,
    tenants: TenantsConfig | None = None,
) -> SimResult:
    """Simulate `runs` on `fleet`. Equal arguments give equal results.

    Args:
        runs: With an `arrival_s` each, unless `arrivals` are given.
        fleet: At least one instance.
        policy: Of router and engines.
        arrivals: Instants, one per run.
        engines: Makes each instance's engine; level 1 by default.
        workflows: Declared to the router.
        hint: Lengths that clients announce, see `sim.hints`; by default none, the router learns
            them.
        rest: Work left of a run that somebody knows; by default the router predicts it.
        outages: Instances that go, and come back.
        until_s: Instant at which to stop; what has not ended by then is unfinished.
        record: Gets the dispatcher's log.
        time_decisions: Fill in `SimResult.decision_us`.
        tenants: Shares, quotas and SLOs of the runs' tenants; None: nobody asks whose a run is.

    Raises:
        ConfigError: Runs without arrivals, two of one name, an outage of an unknown instance,
            or a call longer than an engine's KV cache or than its tenant may ever make.
    """
    simulation = _Simulation(
        fleet,
        policy or PolicyConfig(),
        engines=engines,
        workflows=workflows,
        hint=hint,
        rest=rest,
        record=record,
        time_decisions=time_decisions,
        tenants=tenants,
    )
    simulation.announce(_arriving(runs, arrivals), outages)
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _COLLECT_EVERY) if before[0] else 0, *before[1:])
    try:
        simulation.kernel.run(until_s)
        return simulation.result()
    finally:
        gc.set_threshold(*before)


def _arriving(
    runs: Sequence[TraceRun], arrivals: Sequence[float] | None
) -> list[tuple[float, TraceRun]]:
    if arrivals is not None and len(arrivals) != len(runs):
        raise ConfigError(f"arrivals: expected one per run, {len(runs)}, got {len(arrivals)}")
    times = arrivals if arrivals is not None else [run.arrival_s for run in runs]
    arriving = []
    for time, run in zip(times, runs):
        if time is None or not 0.0 <= time < _INF:
            raise ConfigError(f"run {run.run_id!r}: expected an arrival from 0 s on, got {time!r}")
        arriving.append((time, run))
    if len({run.run_id for run in runs}) != len(runs):
        raise ConfigError("runs: expected each run_id once, got one twice")
    return arriving


class _Simulation:
    """The loop, and what it keeps track of."""

    def __init__(
        self,
        fleet: Sequence[SimInstance],
        policy: PolicyConfig,
        *,
        engines: EngineFactory,
        workflows: Iterable[WorkflowProfile],
        hint: LengthHint | None,
        rest: RestHint | None,
        record: Record | None,
        time_decisions: bool,
        tenants: TenantsConfig | None,
    ) -> None:
        self.kernel = Kernel()
        self._policy = policy
        ledger = Fleet()
        self._engines: list[SimEngine] = []
        self._index: dict[str, int] = {}
        for each in fleet:
            if each.instance.instance_id in self._index:
                raise ConfigError(f"fleet: {each.instance.instance_id!r} is there twice")
            self._index[each.instance.instance_id] = len(self._engines)
            ledger.add(each.instance)
            self._engines.append(engines(each, policy))
        if not self._engines:
            raise ConfigError("fleet: expected at least one instance, got none")
        self._dispatcher = Dispatcher(ledger, policy, workflows, record, tenants)
        self._wakes = [_INF] * len(self._engines)
        self._lets_wait = policy.late_binding or tenants is not None
        self._poll_at = _INF
        """Instant at which it is announced that a quota has room."""
        self._hint = hint
        self._rest = rest
        self._runs: list[RunState] = []
        self._calls: list[CallState] = []
        self._in_flight: dict[str, CallState] = {}
        self._bound_later: dict[str, CallState] = {}
        """Calls with the dispatcher."""
        self._stranded: list[CallState] = []
        """Calls that no healthy instance was there for."""
        self._heads = PromptHeads()
        self._max_tokens = _MAX_TOKENS
        self._decision_us: list[float] | None = [] if time_decisions else None

    def announce(
        self, arriving: Sequence[tuple[float, TraceRun]], outages: Iterable[Outage]
    ) -> None:
        """Put everything on the calendar that does not depend on what happens."""
        for time, run in arriving:
            self.kernel.at(time, self._arrive, run, _THEN)
        longest = max((c.num_output_tokens for _, run in arriving for c in run.calls), default=1)
        self._max_tokens = _MAX_TOKENS * -(-longest // _MAX_TOKENS)
        for outage in outages:
            index = self._index.get(outage.instance_id)
            if index is None:
                raise ConfigError(
                    f"outage: expected one of {sorted(self._index)}, got {outage.instance_id!r}"
                )
            self.kernel.at(outage.start_s, self._go_down, index, _FIRST)
            if outage.end_s < _INF:
                self.kernel.at(outage.end_s, self._come_back, index, _FIRST)

    def result(self) -> SimResult:
        ids = [engine.instance_id for engine in self._engines]
        return SimResult(
            runs=tuple(run_result(run) for run in self._runs),
            calls=tuple(call_result(call, ids) for call in self._calls),
            end_time=self.kernel.now,
            policy=self._policy.fingerprint,
            decision_us=tuple(self._decision_us or ()),
        )

    # A run goes on.

    def _arrive(self, trace: TraceRun) -> None:
        run = RunState(trace, self.kernel.now)
        self._runs.append(run)
        for call in trace.calls:
            if not call.after:
                self._reveal(run, call)
        if not trace.calls:
            run.end_time = self.kernel.now

    def _reveal(self, run: RunState, trace: TraceCall) -> None:
        if trace.gap_s > 0.0:
            self.kernel.at(self.kernel.now + trace.gap_s, self._make_later, (run, trace), _THEN)
        else:
            self._make(run, trace)

    def _make_later(self, value: tuple[RunState, TraceCall]) -> None:
        self._make(*value)

    def _make(self, run: RunState, trace: TraceCall) -> None:
        """The client makes a call: all that the router will know of it is in its request."""
        if run.is_refused:
            return
        call = CallState(run, trace, run.request(trace, self.kernel.now))
        self._calls.append(call)
        self._decide(call)

    # A call goes through the router.

    def _decide(self, call: CallState) -> None:
        """Hand a call to the dispatcher, which binds it now or lets it wait for a `_poll`."""
        begin = clock.perf_counter() if self._decision_us is not None else 0.0
        dispatcher, trace, now = self._dispatcher, call.trace, self.kernel.now
        num_bytes = int(trace.num_prompt_tokens * BYTES_PER_TOKEN)
        request = dispatcher.predict(
            call.request,
            num_prompt_bytes=num_bytes,
            max_tokens=self._max_tokens,
            head=self._heads.of(trace.prefix) if trace.prefix else (),
        )
        if self._hint is not None:
            expected = max(1.0, self._hint(call.run.trace, trace))
            request = request._replace(expected_output_tokens=expected)
        if self._rest is not None:
            request = request._replace(rest_s=self._rest(call.run.trace, trace))
        call.predicted = request
        if request.has_deadline and not call.request.has_deadline:
            call.run.deadline = request.deadline
            call.request = call.request._replace(deadline=request.deadline)
        self._bound_later[request.request_id] = call
        try:
            decision = dispatcher.submit(request, now=now, num_prompt_bytes=num_bytes)
            if decision is None:
                dispatcher.waiting.check(request)
        except NoInstanceError:
            del self._bound_later[request.request_id]
            self._stranded.append(call)
            return
        except OverloadedError:
            self._refuse(call.run)
            return
        except QuotaExceededError as e:
            del self._bound_later[request.request_id]
            if e.retry_after_s is None:
                raise ConfigError(f"call {request.request_id!r}: {e}") from None
            self.kernel.at(now + e.retry_after_s, self._decide, call, _THEN)  # as clients do
            return
        if self._decision_us is not None:
            self._decision_us.append(1e6 * (clock.perf_counter() - begin))
        if decision is not None:
            self._send(decision)
        if self._lets_wait:
            self._poll()

    def _refuse(self, run: RunState) -> None:
        """A client that is refused gives its run up."""
        run.is_refused = True
        for request_id in [i for i, call in self._bound_later.items() if call.run is run]:
            del self._bound_later[request_id]
            self._dispatcher.withdraw(request_id, refused=True)

    def _poll(self) -> None:
        """Send what the dispatcher has let wait until now."""
        for decision in self._dispatcher.poll(self.kernel.now):
            self._send(decision)
        held_until = self._dispatcher.waiting.held_until
        if held_until < self._poll_at:
            self._poll_at = held_until
            self.kernel.at(held_until, self._poll_held, None, _THEN)

    def _poll_held(self, _: None) -> None:
        self._poll_at = _INF
        self._poll()

    def _send(self, decision: Decision) -> None:
        """Forward a call to its instance, with what the engine plug-in would read of it."""
        call = self._bound_later.pop(decision.request_id)
        now, chosen = self.kernel.now, decision.chosen
        index = self._index[chosen.instance_id]
        call.instance = index
        call.sent_time = now
        call.num_attempts += 1
        self._in_flight[decision.request_id] = call
        engine = self._engines[index]
        engine.submit(call.sent(chosen.service_s, now), now)
        self._wake_up(index, engine)

    # An engine goes on.

    def _wake_up(self, index: int, engine: SimEngine) -> None:
        time = engine.next_event_time()
        if time != self._wakes[index]:
            self._wakes[index] = time
            if time != _INF:
                self.kernel.at(time, self._advance, index, _ENGINE)

    def _advance(self, index: int) -> None:
        now = self.kernel.now
        if self._wakes[index] != now:
            return  # it has been told something since this was announced
        engine = self._engines[index]
        self._wakes[index] = math.nan
        in_flight, finished = self._in_flight, EventKind.FINISHED
        for event in engine.advance(now):
            if event.kind is finished:
                self._finish(event)
            else:
                in_flight[event.request_id].first_token_time = event.time
        self._wake_up(index, engine)

    def _finish(self, event: EngineEvent) -> None:
        call = self._in_flight.pop(event.request_id)
        call.end_time = event.time
        call.num_cached = event.num_cached_tokens
        call.num_preemptions = event.num_preemptions
        trace, run = call.trace, call.run
        self._dispatcher.settle(
            Outcome(
                request_id=event.request_id,
                instance_id=self._engines[call.instance].instance_id,
                ok=True,
                ttft_s=call.first_token_time - call.sent_time,
                e2el_s=event.time - call.sent_time,
                num_prompt_tokens=trace.num_prompt_tokens,
                num_cached_tokens=event.num_cached_tokens,
                num_output_tokens=trace.num_output_tokens,
            )
        )
        if self._lets_wait:
            self._poll()
        run.num_open -= 1
        if not run.num_open:
            run.end_time = event.time
        for child in run.then.get(trace.call_id, ()):
            run.missing[child.call_id] -= 1
            if not run.missing[child.call_id]:
                self._reveal(run, child)

    # An instance goes and comes back.

    def _go_down(self, index: int) -> None:
        engine = self._engines[index]
        self._dispatcher.mark(engine.instance_id, healthy=False)
        lost = [(i, call) for i, call in self._in_flight.items() if call.instance == index]
        for request_id, _ in lost:
            engine.abort(request_id, self.kernel.now)
            del self._in_flight[request_id]
            self._dispatcher.settle(
                Outcome(request_id=request_id, instance_id=engine.instance_id, ok=False)
            )
        self._wake_up(index, engine)
        self._poll()
        for _, call in lost:
            call.first_token_time = math.nan
            self._decide(call)

    def _come_back(self, index: int) -> None:
        self._dispatcher.mark(self._engines[index].instance_id, healthy=True)
        self._poll()
        stranded, self._stranded = self._stranded, []
        for call in stranded:
            self._decide(call)
