"""The values of a simulation: runs as a trace has them, calls as an engine gets them.

Lengths here are the true ones. Schedulers see only `StageRequest`, with what was predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol, final

from vllm_workflow.core.types import StageRequest
from vllm_workflow.core.value import Value


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPart:
    """A leading piece of a prompt that other prompts may start with too."""

    part_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceCall:
    """One LLM call of a run as it happened."""

    call_id: str
    """Unique within its run."""
    stage: str
    num_prompt_tokens: int
    num_output_tokens: int
    after: tuple[str, ...] = ()
    """Calls of the run whose answers reveal this one; it starts when the last has ended."""
    gap_s: float = 0.0
    """From there until the call is made: tools, SQL, the agent's own work."""
    prefix: tuple[PrefixPart, ...] = ()
    """The prompt's head, outermost part first. Two prompts share tokens as far as their parts
    are equal; what follows the last part is this call's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRun:
    """One run: its calls, and what was promised to whoever waits for it."""

    run_id: str
    workflow: str
    calls: tuple[TraceCall, ...]
    """Every call appears after those in its `after`."""
    arrival_s: float | None = None
    """Seconds from the start of the trace; None where an arrival process decides."""
    tenant: str = ""
    slo_s: float | None = None
    """Promised end-to-end duration; None where the experiment decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Runs, and what must be said wherever results on them are shown."""

    runs: tuple[TraceRun, ...]
    """In the order of their arrivals, if they have any: then every run has one."""
    source: str
    """The file's name, or `builtin:NAME`."""
    notes: tuple[str, ...] = ()
    """Sentences: what was assumed, left out, resampled."""

    @property
    def num_duplicates(self) -> int:
        """Runs that repeat an earlier one in everything but ids and arrival."""
        return len(self.runs) - len({content(run) for run in self.runs})

    def distinct(self) -> Trace:
        """Return the first of all runs that are equal but for ids and arrival."""
        first: dict[object, TraceRun] = {}
        for run in self.runs:
            first.setdefault(content(run), run)
        if len(first) == len(self.runs):
            return self
        note = f"Of {len(self.runs)} runs, {len(first)} distinct ones were kept."
        return Trace(runs=tuple(first.values()), source=self.source, notes=(*self.notes, note))


def content(run: TraceRun) -> tuple[object, ...]:
    """Return what makes a run, hashable: everything but its ids, names of parts and arrival."""
    position = {call.call_id: i for i, call in enumerate(run.calls)}
    calls = tuple(
        (
            call.stage,
            call.num_prompt_tokens,
            call.num_output_tokens,
            call.gap_s,
            tuple(sorted(position[parent] for parent in call.after)),
            tuple(part.num_tokens for part in call.prefix),
        )
        for call in run.calls
    )
    return run.workflow, run.tenant, run.slo_s, calls


_ENGINE_REQUEST_FIELDS = (
    "request",
    "num_prompt_tokens",
    "num_output_tokens",
    "prefix",
)


@final
class EngineRequest(Value):
    """One call as it reaches an engine. One is made per call, so it is cheap to make."""

    __slots__ = _ENGINE_REQUEST_FIELDS
    _fields = _ENGINE_REQUEST_FIELDS

    request: Final[StageRequest]
    """What the engine's scheduler may know, as the plug-in reads it from the wire."""
    num_prompt_tokens: Final[int]
    num_output_tokens: Final[int]
    """Known to the model alone: no policy may read it."""
    prefix: Final[tuple[PrefixPart, ...]]

    def __init__(
        self,
        request: StageRequest,
        num_prompt_tokens: int,
        num_output_tokens: int,
        prefix: tuple[PrefixPart, ...] = (),
    ) -> None:
        self.request = request
        self.num_prompt_tokens = num_prompt_tokens
        self.num_output_tokens = num_output_tokens
        self.prefix = prefix


class EventKind(Enum):
    """What a client sees of a call."""

    FIRST_TOKEN = "first token"
    FINISHED = "finished"


_ENGINE_EVENT_FIELDS = (
    "time",
    "request_id",
    "kind",
    "num_cached_tokens",
    "num_preemptions",
)


@final
class EngineEvent(Value):
    """Something that a client of the engine would notice."""

    __slots__ = _ENGINE_EVENT_FIELDS
    _fields = _ENGINE_EVENT_FIELDS

    time: Final[float]
    request_id: Final[str]
    kind: Final[EventKind]
    num_cached_tokens: Final[int]
    """Prompt tokens that the prefix cache held when the call was first admitted."""
    num_preemptions: Final[int]

    def __init__(
        self,
        time: float,
        request_id: str,
        kind: EventKind,
        num_cached_tokens: int = 0,
        num_preemptions: int = 0,
    ) -> None:
        self.time = time
        self.request_id = request_id
        self.kind = kind
        self.num_cached_tokens = num_cached_tokens
        self.num_preemptions = num_preemptions


class SimEngine(Protocol):
    """One instance in virtual time. Level 1 and level 2 look the same from outside.

    Time only moves forward: each call's `now` is at least that of the call before, and no
    later than `next_event_time()`.
    """

    instance_id: str

    def submit(self, request: EngineRequest, now: float) -> None:
        """Enqueue a call; its id is new to this engine."""
        ...

    def abort(self, request_id: str, now: float) -> None:
        """Forget a call, in whatever state; one that is not here is ignored."""
        ...

    def next_event_time(self) -> float:
        """Instant at which `advance` has something to do; `inf` when the engine is idle."""
        ...

    def advance(self, now: float) -> list[EngineEvent]:
        """Do what happens up to and including `now`; return what clients notice, in order."""
        ...
