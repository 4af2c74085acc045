"""The values that schedulers exchange. All frozen; all times in seconds.

Several of each are made per call, see `core.value`. They are built with keywords all the same,
but for those that every decision makes.

An *instant* (`arrival_time`, `deadline`, `now`) is a float on the monotonic clock of the
process that holds it and never crosses a process border. A *duration* carries its unit in
its name (`queue_s`). On the wire only durations travel.
"""

from __future__ import annotations

import math
from typing import Final, final

from vllm_workflow.core.prefix import Chain
from vllm_workflow.core.value import Value

_INF: Final = math.inf

_STAGE_REQUEST_FIELDS = (
    "request_id",
    "arrival_time",
    "workflow_id",
    "workflow",
    "stage",
    "tenant_id",
    "model",
    "priority",
    "deadline",
    "run_arrival_time",
    "attained_s",
    "attained_path_s",
    "rest_s",
    "service_s",
    "num_prompt_tokens",
    "expected_output_tokens",
    "max_output_tokens",
    "prefix",
    "final",
    "expected_from",
    "rest_from",
)


@final
class StageRequest(Value):
    """One LLM call of a run, as every policy sees it."""

    __slots__ = _STAGE_REQUEST_FIELDS
    _fields = _STAGE_REQUEST_FIELDS

    request_id: Final[str]
    arrival_time: Final[float]
    """Instant at which the process that holds this value received the call."""
    workflow_id: Final[str]
    """The run this call belongs to; empty for an ordinary call without workflow information."""
    workflow: Final[str]
    """Kind of the run, e.g. `text2sql`; empty if unknown."""
    stage: Final[str]
    tenant_id: Final[str]
    model: Final[str]
    priority: Final[int]
    """OpenAI/vLLM `priority`: lower runs first, before any ordering policy is asked."""
    deadline: Final[float]
    """Instant by which the whole *run* should have ended; `inf` if it has none."""
    run_arrival_time: Final[float]
    """Instant of the run's first call, `nan` if unknown."""
    attained_s: Final[float]
    """Service that the run's finished calls have had, summed, without their queueing; 0 if
    unknown, as of a run that has just begun."""
    attained_path_s: Final[float]
    """The same along the longest path of finished calls: what ran side by side counts once."""
    rest_s: Final[float]
    """Predicted duration of what the run still has to do after this call."""
    service_s: Final[float]
    """Predicted duration of this call on the instance at hand; 0 if unknown."""
    num_prompt_tokens: Final[int]
    """At least 1."""
    expected_output_tokens: Final[float]
    max_output_tokens: Final[int | None]
    """The client's own bound; None if it set none."""
    prefix: Final[Chain]
    """Head of the prompt, as far as other prompts may share it."""
    final: Final[bool]
    """The client said that this is the run's last call."""
    expected_from: Final[str]
    """Where `expected_output_tokens` comes from: `prior`, `declared`, `learned`."""
    rest_from: Final[str]
    """Where `rest_s` comes from: as above, or `client`, who said that this call is the last."""

    def __init__(
        self,
        request_id: str,
        arrival_time: float,
        workflow_id: str = "",
        workflow: str = "",
        stage: str = "",
        tenant_id: str = "",
        model: str = "",
        priority: int = 0,
        deadline: float = math.inf,
        run_arrival_time: float = math.nan,
        attained_s: float = 0.0,
        attained_path_s: float = 0.0,
        rest_s: float = 0.0,
        service_s: float = 0.0,
        num_prompt_tokens: int = 1,
        expected_output_tokens: float = 1.0,
        max_output_tokens: int | None = None,
        prefix: Chain = (),
        final: bool = False,
        expected_from: str = "",
        rest_from: str = "",
    ) -> None:
        self.request_id = request_id
        self.arrival_time = arrival_time
        self.workflow_id = workflow_id
        self.workflow = workflow
        self.stage = stage
        self.tenant_id = tenant_id
        self.model = model
        self.priority = priority
        self.deadline = deadline
        self.run_arrival_time = run_arrival_time
        self.attained_s = attained_s
        self.attained_path_s = attained_path_s
        self.rest_s = rest_s
        self.service_s = service_s
        self.num_prompt_tokens = num_prompt_tokens
        self.expected_output_tokens = expected_output_tokens
        self.max_output_tokens = max_output_tokens
        self.prefix = prefix
        self.final = final
        self.expected_from = expected_from
        self.rest_from = rest_from

    def with_service(self, service_s: float) -> StageRequest:
        """Return the same call with another `service_s`; `_replace` takes much longer."""
        return StageRequest(
            self.request_id,
            self.arrival_time,
            self.workflow_id,
            self.workflow,
            self.stage,
            self.tenant_id,
            self.model,
            self.priority,
            self.deadline,
            self.run_arrival_time,
            self.attained_s,
            self.attained_path_s,
            self.rest_s,
            service_s,
            self.num_prompt_tokens,
            self.expected_output_tokens,
            self.max_output_tokens,
            self.prefix,
            self.final,
            self.expected_from,
            self.rest_from,
        )

    @property
    def has_deadline(self) -> bool:
        return self.deadline != _INF

    @property
    def num_tokens_at_most(self) -> int:
        """Of prompt and answer: what an engine that accepts it must be able to hold."""
        return self.num_prompt_tokens + (self.max_output_tokens or 1)


_CANDIDATE_FIELDS = (
    "instance_id",
    "queue_s",
    "prefill_s",
    "decode_s",
    "harm_s",
    "num_outstanding",
    "outstanding_s",
    "num_cached_tokens",
    "stretch",
)


@final
class Candidate(Value):
    """What running one request on one instance is predicted to cost, in seconds."""

    __slots__ = _CANDIDATE_FIELDS
    _fields = _CANDIDATE_FIELDS

    instance_id: Final[str]
    queue_s: Final[float]
    """Work already accepted by the instance that delays this request."""
    prefill_s: Final[float]
    """Prefill of the prompt tokens that the instance's prefix cache does not hold."""
    decode_s: Final[float]
    harm_s: Final[float]
    """Slowdown that this request would cause to the calls already there, summed over them."""
    num_outstanding: Final[int]
    """Calls sent to the instance and not yet answered."""
    outstanding_s: Final[float]
    """Predicted service of those calls, summed; what they have already done is not subtracted."""
    num_cached_tokens: Final[int]
    """Prompt tokens that the instance's prefix cache is believed to hold."""
    stretch: Final[float]
    """Step time with this call beside the others over step time of this call alone."""

    def __init__(
        self,
        instance_id: str,
        queue_s: float,
        prefill_s: float,
        decode_s: float,
        harm_s: float = 0.0,
        num_outstanding: int = 0,
        outstanding_s: float = 0.0,
        num_cached_tokens: int = 0,
        stretch: float = 1.0,
    ) -> None:
        self.instance_id = instance_id
        self.queue_s = queue_s
        self.prefill_s = prefill_s
        self.decode_s = decode_s
        self.harm_s = harm_s
        self.num_outstanding = num_outstanding
        self.outstanding_s = outstanding_s
        self.num_cached_tokens = num_cached_tokens
        self.stretch = stretch

    @property
    def service_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def alone_s(self) -> float:
        """Service if nothing else ran on the instance."""
        return self.prefill_s + self.decode_s / self.stretch

    @property
    def finish_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_s


_DECISION_FIELDS = (
    "request_id",
    "chosen",
    "cost",
    "candidates",
    "slack_s",
    "policy",
)


@final
class Decision(Value):
    """Where a request goes, with the numbers that sent it there."""

    __slots__ = _DECISION_FIELDS
    _fields = _DECISION_FIELDS

    request_id: Final[str]
    chosen: Final[Candidate]
    cost: Final[float]
    """The policy's figure of merit of `chosen`; the smallest of all candidates."""
    candidates: Final[tuple[Candidate, ...]]
    slack_s: Final[float]
    """Deadline − now − predicted finish − rest of the run, on the chosen instance."""
    policy: Final[str]

    def __init__(
        self,
        request_id: str,
        chosen: Candidate,
        cost: float,
        candidates: tuple[Candidate, ...],
        slack_s: float = math.inf,
        policy: str = "",
    ) -> None:
        self.request_id = request_id
        self.chosen = chosen
        self.cost = cost
        self.candidates = candidates
        self.slack_s = slack_s
        self.policy = policy


_OUTCOME_FIELDS = (
    "request_id",
    "instance_id",
    "ok",
    "ttft_s",
    "e2el_s",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_output_tokens",
)


@final
class Outcome(Value):
    """How one call ended. What is learned is learned from these."""

    __slots__ = _OUTCOME_FIELDS
    _fields = _OUTCOME_FIELDS

    request_id: Final[str]
    instance_id: Final[str]
    ok: Final[bool]
    """An answer with a 2xx status arrived whole."""
    ttft_s: Final[float]
    """From forwarding to the first byte of the answer; `nan` if none came."""
    e2el_s: Final[float]
    """From forwarding to the end of the answer; `nan` if it did not end well."""
    num_prompt_tokens: Final[int | None]
    """As counted by the engine; None if it reported no usage."""
    num_cached_tokens: Final[int | None]
    num_output_tokens: Final[int | None]

    def __init__(
        self,
        request_id: str,
        instance_id: str,
        ok: bool,
        ttft_s: float = math.nan,
        e2el_s: float = math.nan,
        num_prompt_tokens: int | None = None,
        num_cached_tokens: int | None = None,
        num_output_tokens: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.instance_id = instance_id
        self.ok = ok
        self.ttft_s = ttft_s
        self.e2el_s = e2el_s
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = num_cached_tokens
        self.num_output_tokens = num_output_tokens
