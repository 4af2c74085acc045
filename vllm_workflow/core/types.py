"""The values that schedulers exchange. All frozen; all times in seconds.

Several of each are made per call, so they are named tuples, which are the cheapest to make. They
are built with keywords all the same.

An *instant* (`arrival_time`, `deadline`, `now`) is a float on the monotonic clock of the
process that holds it and never crosses a process border. A *duration* carries its unit in
its name (`queue_s`). On the wire only durations travel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from vllm_workflow.core.prefix import Chain


class StageRequest(NamedTuple):
    """One LLM call of a run, as every policy sees it."""

    request_id: str
    arrival_time: float
    """Instant at which the process that holds this value received the call."""
    workflow_id: str = ""
    """The run this call belongs to; empty for an ordinary call without workflow information."""
    workflow: str = ""
    """Kind of the run, e.g. `text2sql`; empty if unknown."""
    stage: str = ""
    tenant_id: str = ""
    model: str = ""
    priority: int = 0
    """OpenAI/vLLM `priority`: lower runs first, before any ordering policy is asked."""
    deadline: float = math.inf
    """Instant by which the whole *run* should have ended; `inf` if it has none."""
    run_arrival_time: float = math.nan
    """Instant of the run's first call, `nan` if unknown."""
    attained_s: float = 0.0
    """Service that the run's finished calls have had, summed, without their queueing; 0 if
    unknown, as of a run that has just begun."""
    attained_path_s: float = 0.0
    """The same along the longest path of finished calls: what ran side by side counts once."""
    rest_s: float = 0.0
    """Predicted duration of what the run still has to do after this call."""
    service_s: float = 0.0
    """Predicted duration of this call on the instance at hand; 0 if unknown."""
    num_prompt_tokens: int = 1
    """At least 1."""
    expected_output_tokens: float = 1.0
    max_output_tokens: int | None = None
    """The client's own bound; None if it set none."""
    prefix: Chain = ()
    """Head of the prompt, as far as other prompts may share it."""
    final: bool = False
    """The client said that this is the run's last call."""
    expected_from: str = ""
    """Where `expected_output_tokens` comes from: `prior`, `declared`, `learned`."""
    rest_from: str = ""
    """Where `rest_s` comes from: as above, or `client`, who said that this call is the last."""

    @property
    def has_deadline(self) -> bool:
        return self.deadline != math.inf

    @property
    def num_tokens_at_most(self) -> int:
        """Of prompt and answer: what an engine that accepts it must be able to hold."""
        return self.num_prompt_tokens + (self.max_output_tokens or 1)


class Candidate(NamedTuple):
    """What running one request on one instance is predicted to cost, in seconds."""

    instance_id: str
    queue_s: float
    """Work already accepted by the instance that delays this request."""
    prefill_s: float
    """Prefill of the prompt tokens that the instance's prefix cache does not hold."""
    decode_s: float
    harm_s: float = 0.0
    """Slowdown that this request would cause to the calls already there, summed over them."""
    num_outstanding: int = 0
    """Calls sent to the instance and not yet answered."""
    outstanding_s: float = 0.0
    """Predicted service of those calls, summed; what they have already done is not subtracted."""
    num_cached_tokens: int = 0
    """Prompt tokens that the instance's prefix cache is believed to hold."""
    stretch: float = 1.0
    """Step time with this call beside the others over step time of this call alone."""

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


class Decision(NamedTuple):
    """Where a request goes, with the numbers that sent it there."""

    request_id: str
    chosen: Candidate
    cost: float
    """The policy's figure of merit of `chosen`; the smallest of all candidates."""
    candidates: tuple[Candidate, ...]
    slack_s: float = math.inf
    """Deadline − now − predicted finish − rest of the run, on the chosen instance."""
    policy: str = ""


class Outcome(NamedTuple):
    """How one call ended. What is learned is learned from these."""

    request_id: str
    instance_id: str
    ok: bool
    """An answer with a 2xx status arrived whole."""
    ttft_s: float = math.nan
    """From forwarding to the first byte of the answer; `nan` if none came."""
    e2el_s: float = math.nan
    """From forwarding to the end of the answer; `nan` if it did not end well."""
    num_prompt_tokens: int | None = None
    """As counted by the engine; None if it reported no usage."""
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None
