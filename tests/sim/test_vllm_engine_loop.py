"""Level 2: its engine loop is vLLM's, shown by running vLLM's own `EngineCore` beside it.

Only the GPU is replaced, by one that takes virtual time; who waits for it, and when, is vLLM's.
"""

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.sim.vllm_builders import (
    EngineCore,
    ModelRunnerOutput,
    VllmEngine,
    engine,
    mixed_arrivals,
    run,
)
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.sim.types import EngineEvent, EngineRequest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Result:
    """A future of vLLM's executor: to ask for its result is to wait for it."""

    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result


class TimedGpu:
    """An executor in virtual time, with the costs and the tokens of a simulated engine."""

    def __init__(self, simulated: VllmEngine) -> None:
        self._simulated = simulated
        self._free_time = 0.0
        self._sent: Any = None

    def execute_model(self, output: Any, non_block: bool) -> Result:
        if not output.num_scheduled_tokens:
            nothing = ModelRunnerOutput(req_ids=[], req_id_to_index={})
            return Result(lambda: nothing)
        step_s, samples = self._simulated._cost(output)
        self._free_time = max(self._free_time, self._simulated._clock.now) + step_s
        self._sent = (list(output.num_scheduled_tokens), samples, self._free_time)
        return Result(lambda: None)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        sent = self._sent
        return Result(lambda: self._wait_for(*sent)) if non_block else self._wait_for(*sent)

    def _wait_for(self, ids: list[str], samples: list[bool], end_time: float) -> Any:
        self._simulated._clock.now = max(self._simulated._clock.now, end_time)
        calls = self._simulated._calls
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={r: i for i, r in enumerate(ids)},
            sampled_token_ids=[
                [calls[r].next_token_id()] if gives_token and r in calls else []
                for r, gives_token in zip(ids, samples, strict=True)
            ],
        )


def run_vllms_loop(
    simulated: VllmEngine, arrivals: list[tuple[float, EngineRequest]]
) -> list[EngineEvent]:
    """As `EngineCoreProc.run_busy_loop`: take in what has arrived, make a step, and again."""
    core = EngineCore.__new__(EngineCore)
    core.scheduler = simulated._scheduler
    core.vllm_config = core.scheduler.vllm_config
    core.model_executor = TimedGpu(simulated)
    core.log_stats = core.is_mm_encoder_only = core.is_pooling_model = False
    core.check_for_draft_tokens = False
    core.aborts_queue = queue.Queue()
    core._weight_version = "default"
    core.batch_queue_size = core.vllm_config.max_concurrent_batches
    core.batch_queue = deque(maxlen=core.batch_queue_size)
    step = core.step_with_batch_queue if core.batch_queue_size > 1 else core.step
    clock, coming, events = simulated._clock, deque(arrivals), list[EngineEvent]()
    while coming or core.batch_queue or core.scheduler.has_requests():
        if not core.batch_queue and not core.scheduler.has_requests():
            clock.now = max(clock.now, coming[0][0])
        while coming and coming[0][0] <= clock.now:
            arrival_time, call = coming.popleft()
            now, clock.now = clock.now, arrival_time
            simulated.submit(call, arrival_time)
            clock.now = now
        outputs, executed = step()
        for of_client in (outputs or {}).values():
            for output in of_client.outputs:
                if output.prefill_stats is not None or output.finish_reason is not None:
                    events += simulated._events(output, clock.now)
        if not executed and core.scheduler.has_requests():
            clock.now += 0.001
    return events


@pytest.mark.parametrize("policy", [None, PolicyConfig()], ids=["vllm", "ours"])
@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(("num_kv_blocks", "max_num_seqs"), [(1001, 64), (1001, 3), (201, 64)])
def test_the_loop_does_what_vllms_engine_core_does(
    policy: PolicyConfig | None, async_scheduling: bool, num_kv_blocks: int, max_num_seqs: int
) -> None:
    arrivals = mixed_arrivals(40)

    def build() -> VllmEngine:
        return engine(
            policy=policy,
            async_scheduling=async_scheduling,
            num_kv_blocks=num_kv_blocks,
            max_num_seqs=max_num_seqs,
        )

    ours, vllms = build(), build()

    assert run(ours, arrivals) == run_vllms_loop(vllms, arrivals)
