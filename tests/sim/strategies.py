"""Random traces, fleets and policies."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.sim.builders import LATENCY, parts, sim_instance, trace_call, trace_run
from vllm_workflow.core import policy_names
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.sim.fleet import SimInstance
from vllm_workflow.sim.types import TraceCall, TraceRun

SLOW = LatencyModel(
    overhead_s=0.0031,
    weights_s=0.0459,
    per_token_s=2.1e-4,
    per_token_below_knee_s=9.3e-5,
    num_knee_tokens=160.0,
    per_seq_s=1.7e-5,
    per_kv_token_s=2.3e-7,
    per_prefill_kv_token_s=5.9e-9,
    max_num_batched_tokens=512,
)
_PREFIXES = (
    (),
    parts(("template", 120)),
    parts(("template", 120), ("schema", 333)),
    parts(("other", 517)),
)


@st.composite
def _policies(draw: st.DrawFn) -> PolicyConfig:
    policy = policy_names.parse(draw(st.sampled_from(policy_names.ALL)))
    late = policy.dispatch != "round-robin" and draw(st.booleans())
    return replace(policy, late_binding=late, relegate=late and policy.relegate)


policies = _policies()


def fleets() -> st.SearchStrategy[list[SimInstance]]:
    one = st.builds(
        sim_instance,
        latency=st.sampled_from([LATENCY, SLOW]),
        max_num_seqs=st.sampled_from([1, 2, 8]),
        num_kv_blocks=st.sampled_from([90, 150, 1000]),
    )
    return st.lists(one, min_size=1, max_size=3).map(_named)


def _named(instances: list[SimInstance]) -> list[SimInstance]:
    return [
        sim_instance(
            f"i{index}",
            latency=i.latency,
            max_num_seqs=i.instance.max_num_seqs,
            num_kv_blocks=i.num_kv_blocks,
        )
        for index, i in enumerate(instances)
    ]


@st.composite
def calls(draw: st.DrawFn, call_id: str, before: list[str]) -> TraceCall:
    prefix = draw(st.sampled_from(_PREFIXES))
    head = sum(part.num_tokens for part in prefix)
    return trace_call(
        call_id,
        stage=draw(st.sampled_from(["generate", "revise", "evaluate"])),
        prompt=head + draw(st.integers(1, 500)),
        output=draw(st.integers(1, 200)),
        after=tuple(sorted(draw(st.sets(st.sampled_from(before), max_size=2)))) if before else (),
        gap_s=draw(st.sampled_from([0.0, 0.0, 0.137])),
        prefix=prefix,
    )


@st.composite
def runs(draw: st.DrawFn, max_runs: int = 6) -> list[TraceRun]:
    found = []
    for index in range(draw(st.integers(1, max_runs))):
        made: list[TraceCall] = []
        for number in range(draw(st.integers(1, 5))):
            made.append(draw(calls(f"c{number}", [c.call_id for c in made])))
        found.append(
            trace_run(
                f"run{index}",
                *made,
                arrival_s=draw(st.integers(0, 4000)) * 1.000117e-3,
                slo_s=draw(st.sampled_from([None, 0.5, 3.0, 30.0])),
            )
        )
    return found
