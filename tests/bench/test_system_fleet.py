from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.builders import part, trace_call
from vllm_workflow.bench.compare import Options
from vllm_workflow.bench.prompts import Prompts
from vllm_workflow.bench.system_fleet import (
    EmulatedFleet,
    emulated_instances,
    scaled_policy,
    server_command,
)
from vllm_workflow.bench.system_words import WORDS, word_tokenizer
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.emulation.model_dir import END_TOKEN, END_TOKEN_ID
from vllm_workflow.sim.scaling import scaled_latency

SETUP = Options().setup


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_servers_are_the_instances_of_the_simulation() -> None:
    found = emulated_instances(SETUP)

    assert tuple(each.sim for each in found) == SETUP.build_fleet()
    assert [each.spec.gpu for each in found] == ["A100", "A100", "A6000", "L40S"]


def test_each_server_takes_the_longest_context_that_its_own_kv_cache_holds() -> None:
    a100, _, a6000, l40s = emulated_instances(SETUP)
    commands = [
        server_command(each, Path("m"), 1, time_scale=4.0, scheduler=None)
        for each in (a100, a6000, l40s)
    ]
    lengths = [int(flag(command, "--max-model-len")) for command in commands]

    assert lengths == [
        (each.sim.num_kv_blocks - 1) * each.sim.block_size for each in (a100, a6000, l40s)
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_a_server_is_told_what_to_emulate_and_stock_vllm_keeps_its_scheduler() -> None:
    l40s = emulated_instances(SETUP)[-1]
    stock = server_command(l40s, Path("m"), 1, time_scale=4.0, scheduler=None)
    ours = server_command(l40s, Path("m"), 1, time_scale=4.0, scheduler="workflow")

    assert flag(stock, "--emulate-gpu") == "L40S"
    assert flag(stock, "--emulate-time-scale") == "4"
    assert flag(stock, "--gpu-memory-utilization") == "0.95"
    assert "--scheduler" not in stock
    assert ours == [*stock, "--scheduler", "workflow"]


@given(
    scale=st.floats(0.5, 20.0),
    num_prefill=st.integers(0, 2048),
    num_decode=st.integers(1, 128),
    num_kv=st.integers(0, 200_000),
)
def test_a_scaled_gpu_takes_each_step_as_many_times_faster(
    scale: float, num_prefill: int, num_decode: int, num_kv: int
) -> None:
    for each in emulated_instances(SETUP):
        batch = {
            "num_prefill_tokens": num_prefill,
            "num_decode_seqs": num_decode,
            "num_kv_tokens": num_kv,
            "prefill_attention": 10.0 * num_prefill,
        }
        latency = each.sim.latency
        scaled = scaled_latency(latency, scale)
        assert scaled.step_s(**batch) == pytest.approx(latency.step_s(**batch) / scale)


def test_a_latency_with_a_knee_of_its_own_keeps_it() -> None:
    latency = LatencyModel(num_knee_tokens=100.0, per_token_below_knee_s=0.00005)

    assert scaled_latency(latency, 4.0).knee_tokens == 100.0


def test_durations_of_a_policy_shrink_and_nothing_else_of_it() -> None:
    policy = PolicyConfig(dispatch="hexgen", alpha=0.7, patience_s=60.0, urgent_slack_s=8.0)
    scaled = scaled_policy(policy, 4.0)

    assert (scaled.patience_s, scaled.urgent_slack_s) == (15.0, 2.0)
    assert (scaled.preempt_margin_s, scaled.preempt_cooldown_s) == (0.5, 0.25)
    assert (scaled.preempt_waste_s, scaled.late_patience_s) == (2.5, 30.0)
    assert (scaled.dispatch, scaled.alpha) == ("hexgen", 0.7)


def test_a_fleet_that_was_never_entered_has_no_urls(tmp_path: Path) -> None:
    fleet = EmulatedFleet(emulated_instances(SETUP), None, time_scale=1.0, folder=tmp_path)

    assert fleet.urls == []


def test_a_text_of_words_has_the_tokens_of_the_trace_and_shares_as_many() -> None:
    tokenizer = word_tokenizer()
    prompts = Prompts.of_words(WORDS, "salt")
    parts = (part("template", 30),)
    texts = [
        json.loads(prompts.json_prompt(run, trace_call("c", prefix=parts, num_prompt_tokens=100)))
        for run in ("r1", "r2")
    ]
    one, other = (tokenizer.encode(text).ids for text in texts)

    assert len(one) == len(other) == 100
    assert one[:30] == other[:30]
    assert one[30:] != other[30:]


def test_the_words_leave_the_ids_alone_that_the_emulated_gpu_knows() -> None:
    tokenizer = word_tokenizer()

    assert tokenizer.token_to_id(END_TOKEN) == END_TOKEN_ID
    assert tokenizer.encode(" a").ids == [0]
    assert tokenizer.decode([0, 0]) == " a a"
