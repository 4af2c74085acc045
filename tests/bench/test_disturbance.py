"""What the router is wrong about, in a comparison."""

import pytest

from vllm_workflow.bench.compare_jobs import Job, Setting, Setup, Variant, find_capacity, run_job
from vllm_workflow.bench.disturbance import Disturbance, parse
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.policy_names import parse as policy
from vllm_workflow.sim.declare import declared
from vllm_workflow.sim.workloads import load


def setup(disturb: str = "none") -> Setup:
    return Setup(
        fleet="A100:2,A6000:1",
        model_shape="llama-3.1-70b",
        weight_bits=4,
        tp=1,
        gpu_memory_utilization=0.95,
        num_runs=12,
        burstiness=1.0,
        disturbance=parse(disturb),
    )


def latencies_s(disturb: str, name: str) -> tuple[float, ...]:
    setting = Setting(trace="builtin:chess", rate=0.1, load=None, slo_scale=5.0, slo_s=None)
    variant = Variant(policy=policy(name))
    return run_job(
        Job(setup=setup(disturb), setting=setting, variant=variant, seed=0, level=1)
    ).latencies_s


def test_a_slow_instance_is_slow_and_the_router_is_not_told():
    plain, slow = setup().build_fleet(), setup("slow:a100-1:2").build_fleet()

    assert [each.instance for each in slow] == [each.instance for each in plain]
    assert slow[0].latency == plain[0].latency
    one_step_s = plain[1].latency.step_s(num_decode_seqs=3, num_kv_tokens=1000)
    assert slow[1].latency.step_s(num_decode_seqs=3, num_kv_tokens=1000) == pytest.approx(
        2 * one_step_s
    )


def test_every_announced_length_is_wrong_by_that_share_for_all_policies_alike():
    run = load("builtin:chess", 1, 0).runs[0]
    hint = parse("lengths:0.6").hint(3)
    again = parse("lengths:0.6").hint(3)
    assert hint is not None
    assert again is not None

    off = [hint(run, call) / call.num_output_tokens for call in run.calls]

    assert {round(share, 6) for share in off} == {0.4, 1.6}
    assert off == [again(run, call) / call.num_output_tokens for call in run.calls]


def test_profiles_are_wrong_by_that_share_or_not_there_at_all():
    told = declared(load("builtin:chess", 5, 0).runs)

    (wrong,) = parse("profiles:0.6").workflows(told)

    for stage, true in zip(wrong.stages, told[0].stages, strict=True):
        assert stage.name == true.name
        assert round(stage.output_tokens / true.output_tokens, 6) in {0.4, 1.6}
        assert round(stage.rounds / true.rounds, 6) in {0.4, 1.6}
    assert parse("cold").workflows(told) == ()
    assert parse("none").workflows(told) == tuple(told)


@pytest.mark.parametrize("disturb", ["cold", "lengths:0.6", "profiles:0.6", "slow:a100-0:2"])
def test_what_the_router_is_wrong_about_changes_what_its_policy_does(disturb: str):
    assert latencies_s(disturb, "workflow") != latencies_s("none", "workflow")


def test_a_policy_that_reads_no_prediction_is_not_disturbed_by_a_wrong_one():
    for disturb in ("cold", "lengths:0.6", "profiles:0.6"):
        assert latencies_s(disturb, "round-robin+fcfs") == latencies_s("none", "round-robin+fcfs")


def test_capacity_is_found_undisturbed_so_that_a_load_is_the_same_rate():
    assert (
        find_capacity(setup("slow:a100-0:2"), "builtin:chess").rate
        == find_capacity(setup(), "builtin:chess").rate
    )


@pytest.mark.parametrize(
    "text",
    [
        *("", "warm", "lengths", "lengths:", "lengths:1", "lengths:nan", "lengths:-0.1", "cold:1"),
        *("slow:a100-0", "slow::2", "slow:a100-0:0", "slow:a100-0:inf", "slow:a100-0:2:3"),
    ],
)
def test_an_unknown_disturbance_is_refused(text: str):
    with pytest.raises(ConfigError, match="--disturb"):
        parse(text)


def test_an_instance_that_is_not_there_cannot_be_slow():
    with pytest.raises(ConfigError, match=r"expected one of \['a100-0', 'a100-1', 'a6000-0'\]"):
        setup("slow:h100-0:2").build_fleet()


def test_nothing_is_disturbed_by_default():
    assert parse("none") == Disturbance()
