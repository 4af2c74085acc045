"""Heads of HTTP messages as bytes."""

from __future__ import annotations

import time
from email.utils import formatdate

from vllm_workflow.router.headers import Headers


def head(first: str, headers: Headers, others: str) -> bytes:
    """Return the head of a message, with the empty line that ends it.

    Args:
        first: Its first lines, with their ends.
        headers: Of it; nothing in them can end a line.
        others: Further lines, with their ends.
    """
    lines = headers.lines
    text = "\r\n".join(lines)
    end = "\r\n" if lines else ""
    return f"{first}{text}{end}{others}\r\n".encode("utf-8", "surrogateescape")


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
