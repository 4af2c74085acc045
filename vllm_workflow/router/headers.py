"""Headers of one message: found by name, and passed on as they stood.

Most messages have headers that everybody sends, each once, in plain ASCII. `read` takes such heads
only, and whole lines of them it knows already; of what it does not take, llhttp is the judge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final


class HeadError(ValueError):
    """A head in which a line would end early: more would be read from it than was meant."""


# What is for one hop, or written anew here: the body is read whole, and has another length then.
_HOP_BY_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization"),
        *("proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)
_NOT_PASSED_ON: Final = _HOP_BY_HOP | {"host", "content-length", "expect"}
# Steady ones: their whole lines come again and again.
_STEADY: Final = (
    *("Host", "Connection", "User-Agent", "Accept", "Accept-Encoding", "Accept-Language"),
    *("Content-Type", "X-Stainless-Lang", "X-Stainless-Package-Version", "X-Stainless-OS"),
    *("X-Stainless-Arch", "X-Stainless-Runtime", "X-Stainless-Runtime-Version"),
    *("X-Stainless-Async", "X-Stainless-Retry-Count", "X-Stainless-Read-Timeout"),
    *("X-Stainless-Timeout", "X-Workflow-Name", "X-Workflow-Stage", "X-Workflow-Slo-Ms"),
    *("X-Workflow-Final", "X-Tenant-Id", "Server", "Date", "Vary", "Cache-Control"),
    *("Sec-Fetch-Mode", "Sec-Fetch-Site", "Sec-Fetch-Dest", "Accept-Charset", "DNT"),
    *("X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "Origin", "Pragma"),
    *("OpenAI-Organization", "OpenAI-Project", "OpenAI-Version", "X-Vllm-Priority"),
)
_VARYING: Final = (
    *("Content-Length", "Authorization", "X-Workflow-Id", "X-Workflow-Budget-Ms"),
    *("X-Workflow-Attained-Ms", "X-Request-Id", "X-Session-Id", "Session-Id", "Idempotency-Key"),
    *("X-Claude-Code-Session-Id", "Traceparent", "Tracestate", "Baggage", "X-Correlation-Id"),
    *("X-Forwarded-For", "X-Real-Ip", "Forwarded", "Via", "Cookie", "Referer", "Retry-After"),
    *("X-Vllm-Session-Id", "X-Api-Key", "Api-Key", "X-Envoy-Expected-Rq-Timeout-Ms"),
    *("X-B3-Traceid", "X-B3-Spanid", "X-B3-Sampled", "X-B3-Parentspanid", "Set-Cookie", "Age"),
)
_MAX_LINES: Final = 1_024
_MAX_LINE: Final = 256
_VISIBLE: Final = bytes(range(0x20, 0x7F))


@final
class _Name:
    """A usual name as it may be written."""

    __slots__ = ("is_passed_on", "is_steady", "lower")

    def __init__(self, lower: str, is_passed_on: bool, is_steady: bool) -> None:
        self.lower = lower
        self.is_passed_on = is_passed_on
        self.is_steady = is_steady


@final
class _Line:
    """A line, read."""

    __slots__ = ("is_passed_on", "name", "value")

    def __init__(self, name: str, value: str, is_passed_on: bool) -> None:
        self.name = name
        self.value = value
        self.is_passed_on = is_passed_on


def _names() -> dict[str, _Name]:
    made: dict[str, _Name] = {}
    for names, is_steady in ((_STEADY, True), (_VARYING, False)):
        for name in names:
            lower = name.lower()
            known = _Name(lower, lower not in _NOT_PASSED_ON, is_steady)
            for written in (name, lower, name.title(), name.replace("-Id", "-ID")):
                made[written] = known
    return made


_KNOWN: Final[dict[str, _Name]] = _names()
_LINES: Final[dict[str, _Line]] = {}
"""Lines of steady names that were read before; no secrets are among them."""


@final
class Headers:
    """Headers of one message.

    Names in arguments are lower case; but for those of `of`, `set` and `add`, which write them.
    """

    __slots__ = ("_first", "_several", "is_usual", "lines")

    def __init__(self) -> None:
        self.lines: list[str] = []
        """Those to be passed on, as they stood: without what is for one hop, without `Host` and
        `Content-Length`."""
        self.is_usual = True
        """Whether nothing but the names that everybody sends was among them."""
        self._first: dict[str, str] = {}
        self._several: dict[str, list[str]] | None = None
        """All values of the names that were given more than once."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Headers:
        """Make them of any names and values.

        Raises:
            HeadError: A line break, or a zero, where none may be.
        """
        made = Headers()
        made.is_usual = False
        for name, value in pairs:
            made._note(name.lower(), value)
            made._append(name, value)
        named = made.get("connection")
        for each in made.values("connection"):
            if each is not named:
                named += "," + each
        dropped = {*_NOT_PASSED_ON, *[part.strip().lower() for part in named.split(",")]}
        for lower in dropped:
            if lower in made._first:
                made._drop(lower)
        return made

    def copy(self) -> Headers:
        made = Headers()
        made.is_usual = self.is_usual
        made._first = self._first.copy()
        made._several = None if self._several is None else self._several.copy()
        made.lines = self.lines.copy()
        return made

    def __len__(self) -> int:
        """How many names there are."""
        return len(self._first)

    def __contains__(self, name: object) -> bool:
        return name in self._first

    def get(self, name: str) -> str:
        """Return the first value of a name, empty if there is none."""
        return self._first.get(name, "")

    def values(self, name: str) -> list[str]:
        """Return all values of a name."""
        if self._several is not None and name in self._several:
            return self._several[name]
        return [self._first[name]] if name in self._first else []

    def has_several(self, name: str) -> bool:
        """Whether a name is there more than once."""
        return self._several is not None and name in self._several

    @property
    def num_given(self) -> int:
        """How many there are, each value of a name that is there several times counted."""
        number = len(self._first)
        if self._several is not None:
            for values in self._several.values():
                number += len(values) - 1
        return number

    def names(self) -> list[str]:
        """Names of what is passed on, as they are written."""
        return [line[: line.find(":")] for line in self.lines]

    def items(self) -> list[tuple[str, str]]:
        """What is passed on: names as they are written, and values."""
        parts = [line.partition(":") for line in self.lines]
        return [(name, value.strip(" \t")) for name, _, value in parts]

    def add(self, name: str, value: str) -> None:
        """Add one that may be there already.

        Raises:
            HeadError: A line break, or a zero, where none may be.
        """
        self._note(name.lower(), value)
        self._append(name, value)

    def set(self, name: str, value: str) -> None:
        """Give a name one value.

        Raises:
            HeadError: A line break, or a zero, where none may be.
        """
        lower = name.lower()
        if lower in self._first:
            self.remove(lower)
        self._first[lower] = value
        self._append(name, value)

    def remove(self, name: str) -> None:
        """Remove a name, if it is there."""
        if self._first.pop(name, None) is not None:
            if self._several is not None:
                self._several.pop(name, None)
            self._drop(name)

    def _note(self, lower: str, value: str) -> None:
        if lower not in self._first:
            self._first[lower] = value
            return
        if self._several is None:
            self._several = {}
        self._several.setdefault(lower, [self._first[lower]]).append(value)

    def _append(self, name: str, value: str) -> None:
        line = f"{name}: {value}"
        if "\n" in line or "\r" in line or "\0" in line:
            raise HeadError("headers: expected none with a line break, got one")
        self.lines.append(line)

    def _drop(self, lower: str) -> None:
        begin = lower + ":"
        size = len(begin)
        self.lines = [line for line in self.lines if line[:size].lower() != begin]


def read(head: bytes) -> Headers | None:
    """Read the head of a message; None if it is no usual one, which is not to say a bad one.

    What is taken is taken by llhttp, too, and read to the same.

    Args:
        head: Its first line, headers, and the empty line that ends it.
    """
    num_ends = len(head.translate(None, _VISIBLE))
    if not head.isascii():
        return None
    lines = head.decode("ascii").split("\r\n")
    # Every line end is there twice over, in the split and as two bytes that are not visible: any
    # further byte of that kind would make more.
    if num_ends != 2 * (len(lines) - 1):
        return None
    made = Headers()
    for index in range(1, len(lines) - 2):
        text = lines[index]
        line = _LINES.get(text)
        if line is None:
            line = _read(text)
            if line is None:
                return None
        if line.name in made._first:
            return None
        made._first[line.name] = line.value
        if line.is_passed_on:
            made.lines.append(text)
    return made


def _read(text: str) -> _Line | None:
    """Read a line of visible characters; None if its name is not a usual one."""
    end = text.find(":")
    known = _KNOWN.get(text[:end]) if end > 0 else None
    if known is None:
        return None
    value = text[end + 1 :].strip(" ")
    if known.lower == "connection" and value.lower() not in {"keep-alive", "close"}:
        return None
    line = _Line(known.lower, value, known.is_passed_on)
    if known.is_steady and len(text) <= _MAX_LINE:
        if len(_LINES) >= _MAX_LINES:
            _LINES.clear()
        _LINES[text] = line
    return line
