"""Makes the LLM calls of one run and keeps their timeline."""

from __future__ import annotations

import json
import zlib

import openai
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from vllm_workflow.client import Run, StageBlock, stage
from vllm_workflow.text2sql.answer import StageCall
from vllm_workflow.text2sql.types import Message, Stage


class StageCaller:
    """One run's way to the model; a failed call is recorded and does not raise.

    Args:
        client: An attached client.
        model: The model's name at the endpoint.
        run: The run that the calls belong to; its clock is the timeline's.
        seed: Every call derives its own sampling seed from it, its stage and its index.
        max_tokens: Most tokens per answer; None leaves it to the server.
    """

    def __init__(
        self, client: AsyncOpenAI, model: str, run: Run, *, seed: int, max_tokens: int | None
    ) -> None:
        self.client = client
        self.model = model
        self.run = run
        self.seed = seed
        self.max_tokens = max_tokens
        self.calls: list[StageCall] = []
        """In the order in which they ended."""

    async def ask(
        self,
        name: Stage,
        messages: list[Message],
        *,
        index: int = 0,
        temperature: float = 0.0,
        final: bool = False,
    ) -> str | None:
        """Return the answer to one call, None if it failed after the SDK's retries.

        Args:
            name: The stage that the call belongs to.
            messages: The prompt.
            index: Which of the parallel calls of the stage this is.
            temperature: 0 for a greedy answer.
            final: Whether this is the run's last call.

        Raises:
            OverloadedError: The router refused the run: no other call of it is worth a try.
        """
        start_s = self.run.elapsed_s
        completion: object = None
        error: str | None = None
        with stage(name.value, final=final) as block:
            try:
                completion = await self.client.chat.completions.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]  # theirs is one type per role
                    temperature=temperature,
                    seed=derived_seed(self.seed, name, index),
                    max_tokens=self.max_tokens,
                )
            except (openai.OpenAIError, json.JSONDecodeError) as failure:
                error = f"{type(failure).__name__}: {failure}"
        if error is None and not (isinstance(completion, ChatCompletion) and completion.choices):
            error = "the answer is not a chat completion with a choice"
        self.calls.append(_stage_call(name, start_s, self.run.elapsed_s, block, completion, error))
        if error is not None and (refusal := self.run.refusal) is not None:
            raise refusal
        if error is not None or not isinstance(completion, ChatCompletion):
            return None
        return completion.choices[0].message.content or ""

    def last_error(self, name: Stage) -> str | None:
        """Return why the last failed call of a stage failed, None if none did."""
        errors = [call.error for call in self.calls if call.stage == name and call.error]
        return errors[-1] if errors else None


def derived_seed(seed: int, name: Stage, index: int) -> int:
    """Return the sampling seed of one call, in [0, 2**31): no two calls share noise."""
    return zlib.crc32(f"{seed}/{name.value}/{index}".encode()) & 0x7FFFFFFF


def _stage_call(
    name: Stage,
    start_s: float,
    end_s: float,
    block: StageBlock,
    completion: object,
    error: str | None,
) -> StageCall:
    """Join what the client saw of the call with what the server counted."""
    last = block.calls[-1] if block.calls else None
    usage = completion.usage if isinstance(completion, ChatCompletion) else None
    details = usage.prompt_tokens_details if usage else None
    return StageCall(
        stage=name.value,
        start_s=start_s,
        end_s=end_s,
        num_attempts=max(1, len(block.calls)),
        instance=last.instance if last else None,
        slack_ms=last.slack_ms if last else None,
        queue_ms=last.queue_ms if last else None,
        num_prompt_tokens=usage.prompt_tokens if usage else None,
        num_cached_tokens=details.cached_tokens if details else None,
        num_output_tokens=usage.completion_tokens if usage else None,
        error=error,
    )
