"""Heads of HTTP messages as bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate


class HeadError(ValueError):
    """A head in which a line would end early: more would be read from it than was meant."""


def head(first: Sequence[str], headers: Mapping[str, str], *others: str) -> bytes:
    """Return the head of a message, with the empty line that ends it.

    Args:
        first: Its first lines.
        headers: Of it.
        others: Further lines.

    Raises:
        HeadError: There is a line break, or a zero, where none may be.
    """
    lines = [*first]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += others
    text = "\r\n".join(lines) + "\r\n\r\n"
    num_breaks = len(lines) + 1
    if text.count("\n") != num_breaks or text.count("\r") != num_breaks or "\0" in text:
        raise HeadError("headers: expected none with a line break, got one")
    return text.encode("utf-8", "surrogateescape")


class _Clock:
    """The date of answers, written anew once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._text = formatdate(second, usegmt=True)
        return self._text


http_date = _Clock()
