"""An emulated A100 under a real server, four times as fast as life, with the workflow scheduler.

Asynchronous scheduling is on here, as on a GPU; with vLLM's own CPU platform it never is.
"""

import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_engine_server import Client, await_requests, client, wf
from tests.integration.vllm_process import VllmServer
from vllm_workflow.core.latency import prefill_attention
from vllm_workflow.emulation.lateness import EmulationCounters, Lateness
from vllm_workflow.emulation.model_dir import END_TOKEN_ID, write_model_dir
from vllm_workflow.profiles import catalogue

__all__ = ["client"]  # the fixture

TIME_SCALE = 4
NUM_BLOCKS = 600
VLLM_FLAGS = (
    *("--scheduler", "workflow", "--emulate-gpu", "A100-80G", "--emulate-weight-bits=4"),
    *("--emulate-model-shape", "llama-3.1-70b", "--emulate-time-scale", str(TIME_SCALE)),
    *("--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-seqs", "48"),
)
LATENCY = catalogue.profile("A100-80G", "llama-3.1-70b", weight_bits=4).latency


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights; stands in for the small model of the other modules."""
    path = tmp_path_factory.mktemp("emulated") / "model"
    write_model_dir(catalogue.shape("llama-3.1-70b"), path)
    return path


def log(server: VllmServer) -> str:
    return server.log_path.read_text(encoding="utf-8", errors="replace")


def finished(answer: "Future[dict[str, Any]]") -> tuple[int, str]:
    body = answer.result()
    return body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]


def test_nobody_can_overlook_that_no_model_is_running(vllm_server: VllmServer) -> None:
    assert "*** EMULATED GPU: NO MODEL IS RUNNING ***" in log(vllm_server)
    assert "llama-3.1-70b at 4 bits on 1 x A100-80G, 4 x as fast as life" in log(vllm_server)
    labels = {"gpu": "A100-80G", "model_shape": "llama-3.1-70b", "time_scale": "4"}
    assert vllm_server.metric("vllm_workflow:emulated_gpu_info", **labels) == 1


def test_scheduling_is_asynchronous_and_the_worker_in_the_engines_process(
    vllm_server: VllmServer,
) -> None:
    # `WorkflowScheduler` makes a `WorkflowSyncScheduler` of itself where it is not.
    assert "WorkflowScheduler: policy" in log(vllm_server)
    assert "WorkflowSyncScheduler" not in log(vllm_server)
    assert "(EngineCore pid=" in log(vllm_server)
    assert "(Worker" not in log(vllm_server)


def test_the_kv_cache_has_the_blocks_that_were_asked_for(vllm_server: VllmServer) -> None:
    assert f"KV cache size: {NUM_BLOCKS * 16:,} tokens" in log(vllm_server)


def test_a_lone_request_takes_the_time_of_the_gpu(client: Client, vllm_server: VllmServer) -> None:
    num_prompt, num_output = 50, 300
    body = {"prompt": "x" * num_prompt, "max_tokens": num_output, "cache_salt": "lone"}
    before = vllm_server.metrics_text()

    connection = client.stream(body)
    answer = connection.getresponse()
    token_times = [time.monotonic() for line in answer if line.startswith(b"data: {")]
    connection.close()
    await_requests(vllm_server, running=0, waiting=0)

    lateness = Lateness.between(before, vllm_server.metrics_text())
    prefill_s = LATENCY.step_s(
        num_prefill_tokens=num_prompt, prefill_attention=prefill_attention(num_prompt)
    )
    decode_s = sum(LATENCY.decode_step_s(1, num_prompt + i) for i in range(1, num_output))
    assert lateness.num_steps == num_output
    assert lateness.busy_s == pytest.approx((prefill_s + decode_s) / TIME_SCALE)
    if lateness.is_valid:  # else this machine was too busy to say anything of times
        measured_s = token_times[-1] - token_times[0]
        assert measured_s == pytest.approx(decode_s / TIME_SCALE, rel=0.15)


def test_what_the_prefix_cache_holds_is_not_computed_again(
    client: Client, vllm_server: VllmServer
) -> None:
    def busy_s() -> float:
        await_requests(vllm_server, running=0, waiting=0)
        return EmulationCounters.from_metrics(vllm_server.metrics_text()).busy_s

    body = {"prompt": "y" * 2000, "max_tokens": 1, "cache_salt": "prefix"}
    start = busy_s()
    client.complete("first", **body).result()
    first = busy_s()
    client.complete("second", **body).result()
    second = busy_s()

    num_cached = 2000 // 16 * 16 - 16  # vLLM computes at least the last token
    assert first - start == pytest.approx(
        LATENCY.step_s(num_prefill_tokens=2000, prefill_attention=prefill_attention(2000))
        / TIME_SCALE
    )
    assert second - first == pytest.approx(
        LATENCY.step_s(
            num_prefill_tokens=2000 - num_cached,
            prefill_attention=prefill_attention(2000 - num_cached, num_cached),
        )
        / TIME_SCALE
    )


def test_an_answer_ends_where_only_the_worker_knows(client: Client) -> None:
    def complete(length: Any, **body: Any) -> "Future[dict[str, Any]]":
        xargs = {"emulated_num_output_tokens": length}
        return client.complete(
            "x", max_tokens=40, vllm_xargs=xargs, **{"ignore_eos": False, **body}
        )

    assert finished(complete(7)) == (7, "stop")
    assert finished(complete(7, min_tokens=20)) == (21, "stop")
    assert finished(complete(7, ignore_eos=True)) == (40, "length")
    assert finished(complete(100)) == (40, "length")
    for junk in ("7", -1, 0, 1e308, [7], 2**62, 7.5):
        assert finished(complete(junk)) == (40, "length")


def test_answers_are_text_and_prompts_may_be_any_token_of_the_vocabulary(client: Client) -> None:
    answer = client.complete("x", max_tokens=5, prompt=[128_255, 0, END_TOKEN_ID, 70_000])

    assert answer.result()["choices"][0]["text"] == "aaaaa"


def test_structured_output_follows_its_grammar(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {
            "sql": {"type": "string"},
            "n": {"type": "integer"},
            "rows": {"type": "array", "items": {"type": "number"}},
            "ok": {"type": "boolean"},
        },
        "required": ["sql", "n", "rows", "ok"],
    }
    body = {"max_tokens": 200, "ignore_eos": False, "structured_outputs": {"json": schema}}
    answers = [client.complete("json", **body) for _ in range(20)]
    longer = client.complete("json", vllm_xargs={"emulated_num_output_tokens": 60}, **body)
    choice = client.complete("choice", **{**body, "structured_outputs": {"choice": ["no", "yes"]}})

    for answer in (*answers, longer):
        assert set(json.loads(answer.result()["choices"][0]["text"])) == set(schema["required"])
    assert finished(longer)[0] >= 60
    assert choice.result()["choices"][0]["text"] in ("no", "yes")


def test_probabilities_are_refused(client: Client) -> None:
    status, content = client.post({"max_tokens": 2, "logprobs": 1})

    assert status == 400
    assert b"an emulated GPU (--emulate-gpu) computes no probabilities" in content


def test_a_storm_of_requests_loses_no_token(client: Client, vllm_server: VllmServer) -> None:
    """Deadlines, preemption for seats and KV blocks, hidden lengths, clients that leave."""
    all_before, ours_before = num_preemptions(vllm_server)
    before = vllm_server.metrics_text()
    wanted, answers, leaving = [], [], []
    for i in range(220):
        budget_ms = (300, 3_000, 600_000, None)[i % 4]
        xargs = wf(id=f"run-{i // 5}", budget_ms=budget_ms) if budget_ms else {}
        max_tokens = 5 + i * 13 % 150
        if i % 3 == 0:
            xargs["emulated_num_output_tokens"] = 1 + i * 7 % 100
        body = {
            "prompt": "x" * (1 + i * 37 % 500),
            "max_tokens": max_tokens,
            "cache_salt": str(i % 50),
            "ignore_eos": False,
            "vllm_xargs": xargs,
        }
        if i % 10 == 9:
            leaving.append(client.submit(_read_a_little_and_leave, client, body))
        else:
            answers.append(client.complete(str(i), **body))
            wanted.append(min(max_tokens, xargs.get("emulated_num_output_tokens", max_tokens)))

    assert [finished(answer)[0] for answer in answers] == wanted
    for each in leaving:
        each.result()
    await_requests(vllm_server, running=0, waiting=0)
    all_after, ours_after = num_preemptions(vllm_server)
    assert ours_after > ours_before
    assert all_after - all_before > ours_after - ours_before
    assert vllm_server.metric("vllm_workflow:failures_total") == 0
    assert Lateness.between(before, vllm_server.metrics_text()).num_steps > 0
    assert finished(client.complete("after", max_tokens=5)) == (5, "length")


def num_preemptions(server: VllmServer) -> tuple[float, float]:
    """All, for KV blocks mostly, and those that the workflow scheduler asked for."""
    metrics = ("vllm:num_preemptions_total", "vllm_workflow:preemptions_total")
    all_of_them, ours = map(server.metric, metrics)
    return all_of_them, ours


def _read_a_little_and_leave(client: Client, body: dict[str, Any]) -> None:
    connection = client.stream({**body, "max_tokens": 400, "ignore_eos": True})
    connection.getresponse().read(20)
    connection.close()
