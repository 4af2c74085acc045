"""Token counts out of an answer, without decoding it."""

from __future__ import annotations

import re

_KEPT_CHUNKS = 4
MAX_USAGE_BYTES = 16_384
# A quote inside a JSON string is escaped, so no generated text can look like such a member.
_COUNT = re.compile(rb'"(?:(prompt|input)|(completion|output)|cached)_tokens"\s*:\s*(\d{1,9})\b')
_USAGE = b'"usage"'
"""Where the counts mostly stand, so that little is searched."""
_EVENT_END = b"\n\n"
_EVENT_ENDS = (_EVENT_END, b"\r\n\r\n")
_DONE = b"data: [DONE]"


class Usage:
    """Watches the chunks of one answer go by; the counts stand at its end."""

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._last: list[bytes] = []
        self._num_events = 0

    def add(self, chunk: bytes) -> None:
        last = self._last
        if len(last) == _KEPT_CHUNKS:
            del last[0]
        last.append(chunk)
        if self._stream:
            self._num_events += chunk.count(_EVENT_END)

    @property
    def ends_event(self) -> bool:
        """Whether the answer so far ends where an SSE event ends, or is empty."""
        return not self._last or b"".join(self._last).endswith(_EVENT_ENDS)

    @property
    def is_done(self) -> bool:
        """Whether the answer so far ends as a stream of completions does."""
        return b"".join(self._last)[-64:].rstrip().endswith(_DONE)

    def counts(self) -> tuple[int | None, int | None, int | None]:
        """Return prompt, cached and output tokens; None for what the answer does not say.

        A stream without usage has about one output token per event, beside the events that
        open and close it.
        """
        last = self._last
        tail = last[0] if len(last) == 1 else b"".join(last)
        first = max(len(tail) - MAX_USAGE_BYTES, 0)
        start = max(tail.rfind(_USAGE), first)
        num_prompt = num_cached = num_output = None
        for prompt, output, number in _COUNT.findall(tail, start) or _COUNT.findall(tail, first):
            if prompt:
                num_prompt = int(number)
            elif output:
                num_output = int(number)
            else:
                num_cached = int(number)
        if num_output is None and self._num_events > 2:
            num_output = self._num_events - 2
        return num_prompt, num_cached, num_output
