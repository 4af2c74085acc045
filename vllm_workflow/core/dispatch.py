"""Dispatch: which instance runs a call.

A policy ranks predicted seconds. It reads no clock and draws no random number, so a router,
a simulator and a replay that give it the same sequence of calls get the same decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.types import Candidate, StageRequest


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
class Hexgen:
    """Workload-balanced dispatch of HexGen-Text2SQL (arXiv 2505.05286).

        score = α · T̄ / T_e − (1 − α) · W_e / W̄

    T_e is this call's predicted service on instance e, W_e the service of all calls in
    flight there; T̄ and W̄ are their means over the instances, where the published code
    takes an arbitrary first one. Work leaves W_e when a call ends (there it never does), and
    is in seconds of that instance, so no constant per GPU model is needed.
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
        return [c.finish_s + c.harm_s for c in candidates]


def build(config: PolicyConfig) -> DispatchPolicy:
    """Make the dispatch policy that `config` names."""
    match config.dispatch:
        case "round-robin":
            return RoundRobin()
        case "least-outstanding":
            return LeastOutstanding()
        case "hexgen":
            return Hexgen(config.alpha)
        case _:
            return PredictedFinish()
