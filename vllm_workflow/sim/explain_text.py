"""An explanation of a run for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vllm_workflow.core.policy_names import name_of
from vllm_workflow.sim.explain import Attempt, Call, Run, reason


def text(run: Run) -> str:
    """Return the run, call by call."""
    return "\n".join(_lines(run))


def _lines(run: Run) -> Iterator[str]:
    begin = run.arrival_time
    workflow = run.calls[0].request.workflow
    tenant = f" of tenant {run.tenant_id!a}" if run.tenant_id else ""
    kind = f" ({workflow!a})" if workflow else ""
    yield f"run {run.workflow_id!a}{kind}{tenant}: {len(run.calls)} calls, {_ending(run)}"
    waited_s = math.fsum(a.wait_s for c in run.calls for a in c.attempts if math.isfinite(a.wait_s))
    yield f"waited in the router {waited_s:.3g} s in all; seconds below are from the run's begin"
    for number, call in enumerate(run.calls, start=1):
        yield ""
        yield from _call_lines(number, call, begin)


def _ending(run: Run) -> str:
    took_s = run.end_time - run.arrival_time
    slo_s = run.deadline - run.arrival_time
    took = f"last good answer after {took_s:.3g} s" if math.isfinite(took_s) else "no good answer"
    if not math.isfinite(slo_s):
        return f"{took}, no deadline"
    how = "met" if took_s <= slo_s else "missed"
    return f"{took}, promised {slo_s:.3g} s: {how}"


def _call_lines(number: int, call: Call, begin: float) -> Iterator[str]:
    request = call.request
    stage = f"{request.stage!a}" if request.stage else "call"
    final = ", the last" if request.final else ""
    yield (
        f"{number}. {stage} at {request.arrival_time - begin:.3f} s{final}: "
        f"{request.num_prompt_tokens} prompt tokens and {request.expected_output_tokens:.0f} of "
        f"answer expected, then {request.rest_s:.3g} s more of the run"
    )
    for attempt in call.attempts:
        yield from (f"   {line}" for line in _attempt_lines(attempt, call, begin))


def _attempt_lines(attempt: Attempt, call: Call, begin: float) -> Iterator[str]:
    if attempt.exclude:
        yield f"again, without {', '.join(attempt.exclude)}"
    decision = attempt.decision
    if decision is None:
        yield f"{reason(attempt)}; policy {name_of(attempt.policy)} {attempt.policy.fingerprint}"
        return
    slack = f"{decision.slack_s:.3g} s" if math.isfinite(decision.slack_s) else "no deadline"
    yield (
        f"→ {decision.chosen.instance_id} at {attempt.decide_time - begin:.3f} s after "
        f"{attempt.wait_s:.3f} s of waiting, slack {slack}, "
        f"policy {name_of(attempt.policy)} {attempt.policy.fingerprint}"
    )
    yield f"  {reason(attempt)}"
    yield (
        f"  {'instance':16} {'queue':>8} {'prefill':>8} {'decode':>8} {'finish':>8} {'harm':>8} "
        f"{'cost':>9} {'calls':>6} {'cached':>7}"
    )
    for candidate, cost in zip(decision.candidates, attempt.costs, strict=True):
        mark = "*" if candidate.instance_id == decision.chosen.instance_id else " "
        seconds = (
            candidate.queue_s,
            candidate.prefill_s,
            candidate.decode_s,
            candidate.finish_s,
            candidate.harm_s,
        )
        yield (
            f" {mark}{candidate.instance_id:16} {' '.join(f'{s:8.3f}' for s in seconds)} "
            f"{'?' if cost is None else f'{cost:.3f}':>9} {candidate.num_outstanding:6} "
            f"{candidate.num_cached_tokens:7}"
        )
    yield f"  {_happened(attempt, call)}"


def _happened(attempt: Attempt, call: Call) -> str:
    outcome, decision = attempt.outcome, attempt.decision
    if outcome is None or decision is None:
        return "had not ended when the log did"
    chosen = decision.chosen
    if not outcome.ok:
        begun = "" if math.isnan(outcome.ttft_s) else f", first byte after {outcome.ttft_s:.3f} s"
        return f"failed{begun}"
    parts = [f"finish {chosen.finish_s:.3f} s predicted, {outcome.e2el_s:.3f} s happened"]
    for what, predicted, counted in (
        ("answer", call.request.expected_output_tokens, outcome.num_output_tokens),
        ("prompt", call.request.num_prompt_tokens, outcome.num_prompt_tokens),
        ("cached", chosen.num_cached_tokens, outcome.num_cached_tokens),
    ):
        if counted is not None:
            parts.append(f"{what} {predicted:.0f} → {counted} tokens")
    return "; ".join(parts)


def as_json(run: Run) -> dict[str, Any]:
    """Return everything that `text` says; numbers that are not finite are left out as None."""
    begin = run.arrival_time
    return {
        "run": run.workflow_id,
        "tenant": run.tenant_id,
        "workflow": run.calls[0].request.workflow,
        "latency_s": _finite(run.end_time - begin),
        "slo_s": _finite(run.deadline - begin),
        "calls": [_call(call, begin) for call in run.calls],
    }


def _call(call: Call, begin: float) -> dict[str, Any]:
    request = call.request
    return {
        "request_id": request.request_id,
        "stage": request.stage,
        "at_s": request.arrival_time - begin,
        "num_prompt_tokens": request.num_prompt_tokens,
        "expected_output_tokens": request.expected_output_tokens,
        "rest_s": _finite(request.rest_s),
        "attempts": [_attempt(attempt, begin) for attempt in call.attempts],
    }


def _attempt(attempt: Attempt, begin: float) -> dict[str, Any]:
    decision, outcome = attempt.decision, attempt.outcome
    found: dict[str, Any] = {
        "policy": attempt.policy.fingerprint,
        "policy_name": name_of(attempt.policy),
        "excluded": list(attempt.exclude),
        "wait_s": _finite(attempt.wait_s),
        "decided_at_s": _finite(attempt.decide_time - begin),
        "reason": reason(attempt),
        "withdrawn": attempt.withdrawn,
    }
    if decision is not None:
        found |= {
            "instance": decision.chosen.instance_id,
            "slack_s": _finite(decision.slack_s),
            "candidates": [
                {
                    **{name: _finite(value) for name, value in candidate._asdict().items()},
                    "finish_s": _finite(candidate.finish_s),
                    "cost": None if cost is None else _finite(cost),
                }
                for candidate, cost in zip(decision.candidates, attempt.costs, strict=True)
            ],
        }
    if outcome is not None:
        found["outcome"] = {
            "ok": outcome.ok,
            "ttft_s": _finite(outcome.ttft_s),
            "e2el_s": _finite(outcome.e2el_s),
            "num_prompt_tokens": outcome.num_prompt_tokens,
            "num_cached_tokens": outcome.num_cached_tokens,
            "num_output_tokens": outcome.num_output_tokens,
        }
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
