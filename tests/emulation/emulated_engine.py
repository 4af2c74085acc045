"""vLLM's own scheduler, driven as the engine core does, with emulated requests for a worker."""

import warnings
from collections import deque
from pathlib import Path
from typing import Any

with warnings.catch_warnings():  # those of vLLM's dependencies are none of ours
    warnings.simplefilter("ignore")
    from vllm.v1.outputs import ModelRunnerOutput

    from tests.engine.engine_builders import build_request, build_scheduler

from vllm_workflow.emulation.requests import EmulatedRequests, Step

EOS = 2
TOKEN = 7


class EmulatedEngine:
    """Steps, and what became of the requests. In asynchronous mode one step runs ahead."""

    def __init__(
        self,
        model_dir: Path,
        *,
        asynchronous: bool = True,
        second_runner: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build a scheduler; `second_runner`: one that speaks to vLLM's second model runner."""
        self.scheduler = build_scheduler(model_dir, asynchronous=asynchronous, **kwargs)
        self.scheduler.use_v2_model_runner = second_runner
        self.worker = EmulatedRequests(token_id=TOKEN)
        self.answers: dict[str, list[int]] = {}
        self._depth = 2 if asynchronous else 1
        self._in_flight: deque[tuple[Any, Step]] = deque()

    def add(
        self,
        name: str,
        num_tokens: int,
        *,
        max_tokens: int = 64,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop_token_ids: list[int] | None = None,
        **extra_args: Any,
    ) -> Any:
        request = build_request(
            name, num_tokens=num_tokens, max_tokens=max_tokens, extra_args=extra_args
        )
        params = request.sampling_params
        params.ignore_eos, params.min_tokens = ignore_eos, min_tokens
        params.stop_token_ids = stop_token_ids or []
        params.update_from_generation_config({}, eos_token_id=EOS)
        self.scheduler.add_request(request)
        self.answers[name] = []
        return request

    def step(self) -> Step | None:
        """Launch the next step, and return it; None when there is nothing left to launch."""
        output = self.scheduler.schedule()
        self.worker.forget(output.finished_req_ids)
        step = None
        if output.total_num_scheduled_tokens:
            step = self.worker.step(output)
            assert sorted(step.request_ids) == sorted(output.num_scheduled_tokens)
            num_tokens = step.num_prefill_tokens + step.num_decode_seqs
            assert num_tokens == output.total_num_scheduled_tokens
            self._agree_on_outputs(step)
        self._in_flight.append((output, step or Step()))
        while self._in_flight and (step is None or len(self._in_flight) >= self._depth):
            self._hand_over()
        return step

    def run(self) -> list[Step]:
        """Run until all requests have ended."""
        steps = []
        while self.scheduler.has_requests():
            step = self.step()
            if step is not None:
                steps.append(step)
            assert len(steps) < 10_000, "no end"
        while self._in_flight:
            self._hand_over()
        return steps

    def _agree_on_outputs(self, step: Step) -> None:
        """Who gets a token, and which one of its answer that is, as the scheduler has it."""
        for request_id, token_ids in zip(step.request_ids, step.token_ids):
            request = self.scheduler.requests[request_id]
            assert bool(token_ids) == (not request.is_prefill_chunk)
            if request_id in step.output_numbers:
                # In asynchronous mode this step's token is a placeholder already.
                num_before = request.num_output_tokens + request.num_output_placeholders
                number = num_before + (self._depth == 1)
                assert step.output_numbers[request_id] == number

    def _hand_over(self) -> None:
        output, step = self._in_flight.popleft()
        by_client = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=step.request_ids,
                req_id_to_index={r: i for i, r in enumerate(step.request_ids)},
                sampled_token_ids=step.token_ids,
            ),
        )
        for outputs in by_client.values():
            for each in outputs.outputs:
                self.answers[each.request_id] += each.new_token_ids
