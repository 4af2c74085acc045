"""An instance's answer on its way to the client: held until it is whole, or passed on as it comes.

An answer that is no stream is held, so that one that breaks off can be asked for elsewhere. Of a
stream the client has a part already: it ends with an error event, and without the end that
its framing and its format ask for, so that no client can take it for a complete one.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from enum import Enum

from vllm_workflow.router.attempt import Attempt, Refusal
from vllm_workflow.router.connection import Connection
from vllm_workflow.router.errors import BrokenOffError, LostError, error_json
from vllm_workflow.router.exchange import Answer, Reply
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.tries import is_refusal
from vllm_workflow.router.watch import TICK_S, Silence

MAX_HELD_BYTES = 8 << 20
"""A larger answer is passed on as it comes, so that the memory taken by one is bounded."""
_ERROR_EVENT = b'data: {"error"'
_EVENT_END = b"\n\n"
_LATER_ERROR = _EVENT_END + _ERROR_EVENT
_ABORT = b'"abort"'
# A quote inside a JSON string is escaped, so no generated text can look like such a member.
_ABORTED = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_EVENT_ENDS = (_EVENT_END, b"\r\n\r\n")
_MAX_EVENT_BYTES = 1 << 20
# An event names its type on a line of its own, or as the first or the last member of its data.
# Text, of a user or generated, has neither such a line, for JSON escapes what breaks one, nor such
# a member at these places.
_FINAL = re.compile(
    rb"\n(?:event: ?response\.(?:completed|incomplete|failed)\r?\n"
    rb'|data: ?\{"type": ?"response\.(?:completed|incomplete|failed)")'
    rb'|"type": ?"response\.(?:completed|incomplete|failed)"\}\r?\n'
)
_MAX_FINAL_BYTES = 64
_LAST_WORDS_S = 1.0


class Ending(Enum):
    """What tells the end of an answer from a place where it broke off."""

    FRAMING = 0
    """Nothing beyond what HTTP says."""
    DONE = 1
    """`[DONE]`: a stream of completions."""
    FINAL_EVENT = 2
    """`response.completed`, `response.incomplete` or `response.failed`: a stream of a response,
    which vLLM ends with the first of them and without `[DONE]`."""


def held_bytes(status: int, headers: Headers) -> float:
    """Bytes of such an answer up to which nobody looks at it before its end."""
    return 0 if is_refusal(status) or is_event_stream(headers) else MAX_HELD_BYTES


def is_aborted(data: bytes) -> bool:
    """Whether an answer says that its engine has given it up.

    So end the answers that vLLM has under way when it is told to stop: with a status of 200, what
    there was of the text, and `[DONE]`.
    """
    return _ABORT in data and _ABORTED.search(data) is not None


def check_whole(upstream: Connection, body: bytes) -> None:
    """See that an answer is one: its engine has not given it up, and if it ends when its
    connection does, as those without a length, it has come to its end.

    Raises:
        LostError: It is not.
    """
    if is_aborted(body):
        raise LostError("aborted")
    headers = upstream.headers
    if body and "content-length" not in headers and "transfer-encoding" not in headers:
        try:
            json.loads(body)
        except ValueError:
            raise LostError("disconnected") from None


class Passing:
    """An answer that is passed on as it comes."""

    def __init__(self, attempt: Attempt, silence: Silence, reply: Reply, ending: Ending) -> None:
        self.is_whole = False
        """Whether all of it has come, as far as its framing and its format say."""
        self._reply = reply
        self._attempt = attempt
        self._silence = silence
        self._has_events = False
        self._has_error = False
        self._is_aborted = False
        self._begun = b""
        """Of an event whose end has not come."""
        self._ending = ending
        self._awaits_final = ending is Ending.FINAL_EVENT
        self._before = b"\n"
        """The last bytes in which the final event has not been found."""

    async def run(self, answer: Answer, upstream: Connection, first: bytes) -> None:
        """Pass it on to its end, well or not.

        Args:
            answer: Its head.
            upstream: Gives the rest.
            first: What has come already.
        """
        has_events = is_event_stream(upstream.headers)
        await self._reply.begin(answer)
        self._has_events = has_events
        chunk = first
        while chunk and not self._has_error:
            await self._write(self._whole_events(chunk) if has_events else chunk)
            if self._is_aborted:
                return
            try:
                chunk = await upstream.read()
            except BrokenOffError:
                return
        begun, self._begun = self._begun, b""
        if not self._has_error and self._has_ended(begun):
            self.is_whole = True
            await self._write(begun)

    def _has_ended(self, begun: bytes) -> bool:
        """Whether an answer whose framing is complete is so by its format.

        Args:
            begun: What it ends with, if that is no whole event.
        """
        if self._ending is Ending.DONE:
            return self._attempt.usage.is_done or begun.rstrip() == b"data: [DONE]"
        if self._ending is Ending.FINAL_EVENT:
            return not (self._awaits_final or begun) and self._attempt.usage.ends_event
        return True

    def _look_for_final(self, data: bytes) -> None:
        data = self._before + data
        self._awaits_final = _FINAL.search(data) is None
        self._before = data[-_MAX_FINAL_BYTES:]

    async def _write(self, data: bytes) -> None:
        attempt = self._attempt
        if not data:
            return
        attempt.usage.add(data)
        if self._awaits_final:
            self._look_for_final(data)
        attempt.is_reading = False
        begin = time.monotonic()
        await self._reply.write(data)
        took_s = time.monotonic() - begin
        attempt.is_reading = True
        attempt.write_s += took_s
        if took_s > TICK_S:
            self._silence.resume(attempt)

    def _whole_events(self, chunk: bytes) -> bytes:
        """Return what can be passed on: half an event could not be followed by an error.

        What follows an error event of the engine is cut, for it says that all is well; so is the
        event by which the engine gives the answer up, and what follows it.
        """
        data = self._begun + chunk if self._begun else chunk
        end = len(data)
        if not data.endswith(_EVENT_ENDS):
            end = max(data.rfind(mark) + len(mark) * (mark in data) for mark in _EVENT_ENDS)
            end = max(end, 0) if len(data) < _MAX_EVENT_BYTES else len(data)
        data, self._begun = data[:end], data[end:]
        if _ABORT in data and (aborted := _ABORTED.search(data)):
            self._is_aborted = True
            end = data.rfind(_EVENT_END, 0, aborted.start())
            return b"" if end < 0 else data[: end + len(_EVENT_END)]
        start = 0 if data.startswith(_ERROR_EVENT) else data.find(_LATER_ERROR)
        if start < 0:
            return data
        self._has_error = True
        end = data.find(_EVENT_END, start + len(_EVENT_END))
        return data if end < 0 else data[: end + len(_EVENT_END)]

    async def break_off(self) -> None:
        """Let the client know that what it has is not the whole answer."""
        try:
            if self._has_events and not self._has_error:
                instance_id = self._attempt.instance_id
                error = error_json(
                    502, f"instance {instance_id} broke off its answer", code="upstream_lost"
                )
                begin = b"data: " if self._attempt.usage.ends_event else b"\n\ndata: "
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._reply.write(begin + error + _EVENT_END)
        except TimeoutError:  # it does not read
            self._reply.abort()
        self._reply.close()


def is_event_stream(headers: Headers) -> bool:
    """Whether an answer is a stream of server-sent events."""
    return headers.get("content-type").startswith("text/event-stream")


def error_at_start(instance_id: str, first: bytes, headers: Headers) -> Refusal | None:
    """Return the error that a stream begins with, if it is the engine's: nothing is lost yet."""
    if not first.startswith(_ERROR_EVENT):
        return None
    event = first.partition(_EVENT_END)[0].removeprefix(b"data: ")
    try:
        code = json.loads(event)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    if not isinstance(code, int) or not 500 <= code < 600:
        return None
    status = 503 if code == 503 else 500
    kept = headers.copy()
    kept.set("Content-Type", "application/json")
    return Refusal(instance_id, status, kept, event)
