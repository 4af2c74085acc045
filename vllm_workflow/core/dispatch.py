"""Dispatch: which instance runs a call.

A policy ranks predicted seconds. It reads no clock, and what looks random follows from the
request's id, so a router, a simulator and a replay that give it the same sequence of calls get
the same decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, Protocol

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.types import Candidate, StageRequest

UNDRAWN_COST: Final = 1e9
"""More than any instance has calls in flight; finite, so that it can be written down."""


class DispatchPolicy(Protocol):
    """Chooses one of several candidates."""

    def costs(self, request: StageRequest, candidates: Sequence[Candidate]) -> list[float]:
        """Return one cost per candidate, shape (len(candidates),); the smallest is chosen.

        `candidates` is not empty. Ties go to the candidate that comes first.
        """
        ...


@dataclass(slots=True)
class RoundRobin:
    """Each in turn, whatever it costs: the one whose last turn is longest ago.

    The turns are the only state that a policy here keeps. Kept per instance, they stay fair
    when instances come and go and when a call is retried on those it has not failed on.
    """

    turn: int = 0
    last_turn: dict[str, int] = field(default_factory=dict)

    def costs(self, request: StageRequest, candidates: Sequence[Candidate]) -> list[float]:
        costs = [float(self.last_turn.get(c.instance_id, 0)) for c in candidates]
        chosen = candidates[costs.index(min(costs))]
        self.turn += 1
        self.last_turn[chosen.instance_id] = self.turn
        return costs


@dataclass(frozen=True, slots=True)
class LeastOutstanding:
    """Fewest calls in flight: ignores how fast an instance is and how long a call."""

    def costs(self, request: StageRequest, candidates: Sequence[Candidate]) -> list[float]:
        return [float(c.num_outstanding) for c in candidates]


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The one of two drawn at random that has fewer calls in flight.

    Mitzenmacher, "The power of two choices in randomized load balancing" (2001); what many
    proxies do. Two distinct instances are drawn for each call, each pair as often as any
    other; the first drawn wins a tie, so that an idle fleet is used evenly. The draw is a hash
    of seed and request id. An instance that was not drawn costs `UNDRAWN_COST` more: it is
    chosen only where calls wait and neither of the drawn ones can start this one.
    """

    seed: int = 0

    def costs(self, request: StageRequest, candidates: Sequence[Candidate]) -> list[float]:
        if len(candidates) == 1:
            return [float(candidates[0].num_outstanding)]
        first, second = self.draw(request.request_id, len(candidates))
        costs = [UNDRAWN_COST + c.num_outstanding for c in candidates]
        costs[first] = float(candidates[first].num_outstanding)
        costs[second] = candidates[second].num_outstanding + 0.5
        return costs

    def draw(self, request_id: str, num_candidates: int) -> tuple[int, int]:
        """Two different indices below `num_candidates`, which is at least 2."""
        text = f"{self.seed}:{request_id}".encode("utf-8", "surrogatepass")
        number = int.from_bytes(blake2b(text, digest_size=8).digest())
        number, first = divmod(number, num_candidates)
        second = number % (num_candidates - 1)
        return first, second + (second >= first)


@dataclass(frozen=True, slots=True)
class Hexgen:
    """Workload-balanced dispatch of HexGen-Text2SQL (arXiv 2505.05286).

        score = α · T̄ / T_e − (1 − α) · W_e / W̄

    T_e is this call's predicted service on instance e, W_e the service of all calls in
    flight there; T̄ and W̄ are their means over the instances. The released code differs:

    - T̄ and W̄ are those of the engine that was added first, and a call goes there without
      a score while that engine has been given nothing.
    - W_e is all work ever sent to an engine: nothing is taken off when a call ends, so it
      balances totals since the start, not load. Here W_e is what is in flight.
    - W_e is weighed by a constant per GPU model, 0.5 or 1. Here it is in seconds of that
      instance, which says the same of every model.
    - T_e is one measured latency per stage and GPU model. Here it is predicted from this
      call's lengths, and follows the instance's speed.

    As published: both terms are ratios, so an instance that loses can change the winner, and
    α has to be tuned for each load; its authors chose 0 to 0.4, trace by trace.
    """

    alpha: float = 0.3

    def costs(self, request: StageRequest, candidates: Sequence[Candidate]) -> list[float]:
        mean_service_s = sum(c.service_s for c in candidates) / len(candidates)
        mean_work_s = sum(c.outstanding_s for c in candidates) / len(candidates)
        return [
            (1.0 - self.alpha) * (c.outstanding_s / mean_work_s if mean_work_s > 0.0 else 0.0)
            - self.alpha * (mean_service_s / c.service_s if c.service_s > 0.0 else 0.0)
            for c in candidates
        ]


@dataclass(frozen=True, slots=True)
class PredictedFinish:
    """Earliest predicted finish, plus the slowdown it causes to the calls already there."""

    def costs(self, request: StageRequest, candidates: Sequence[Candidate]) -> list[float]:
        return [c.queue_s + c.prefill_s + c.decode_s + c.harm_s for c in candidates]


def build(config: PolicyConfig) -> DispatchPolicy:
    """Make the dispatch policy that `config` names."""
    match config.dispatch:
        case "round-robin":
            return RoundRobin()
        case "least-outstanding":
            return LeastOutstanding()
        case "hexgen":
            return Hexgen(config.alpha)
        case "power-of-two":
            return PowerOfTwo(config.seed)
        case _:
            return PredictedFinish()
