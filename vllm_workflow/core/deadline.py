"""From a run's promise to the slack of one call."""

from __future__ import annotations

import math

from vllm_workflow.core.types import StageRequest


def slack_s(*, deadline: float, now: float, finish_s: float, rest_s: float) -> float:
    """Seconds to spare if the call ends `finish_s` from `now` and the run needs `rest_s` more.

    Negative when the run is predicted to miss its deadline; `inf` without a deadline.
    """
    return deadline - now - finish_s - rest_s


def proportional_budget_s(budget_s: float, service_s: float, rest_s: float) -> float:
    """This call's share of the run's remaining budget, in proportion to predicted work.

    The split of HexGen-Text2SQL (arXiv 2505.05286): budget · service / (service + rest).
    A call of unknown service may use what the rest of the run leaves. A budget already
    spent is returned unsplit: a share of a negative number would make long calls of a
    late run look more urgent than short ones, although neither can be on time.
    """
    if budget_s <= 0.0 or math.isinf(budget_s):
        return budget_s
    if service_s <= 0.0:
        return max(0.0, budget_s - rest_s)
    return budget_s * service_s / (service_s + rest_s)


def is_hopeless(request: StageRequest, now: float) -> bool:
    """Whether a call's run is late, or will be even if this call took no time.

    Args:
        request: With `rest_s`.
        now: Instant at which it could start at the earliest.
    """
    return request.deadline - now <= request.rest_s
