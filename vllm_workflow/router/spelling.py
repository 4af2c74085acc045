"""Names in requests that look like ours and are none of them: somebody meant something by them.

Never an error, they may be somebody else's and pass through; but a promise that is made under a
misspelled name is no promise, and nothing else would say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from vllm_workflow.router.wire import FIELD_NAMES, is_label

MAX_TOLD = 32
"""Names of one place that are told; those beyond are counted as `other`."""
OTHER = "other"
_MAX_LENGTH = 64
"""Of a name that is compared with ours, and of what is told of a longer one."""
_MAX_FINE = 4_096
_MAX_JUDGED = 16
"""Names that are new, in one request: comparing takes some 50 µs each."""
_CLOSE = 0.85
"""A letter or two too few, too many, or changed."""
_logger = logging.getLogger(__name__)


class Spelling:
    """Looks at the names in requests.

    Args:
        count: Told for each such name of each request: where it stood, and the name.
    """

    def __init__(self, count: Callable[[str, str], None]) -> None:
        headers, metadata, xargs = FIELD_NAMES
        self._headers = _Place("header", "x-workflow", headers, count)
        self._metadata = _Place("metadata", "workflow_", metadata, count)
        self._xargs = _Place("vllm_xargs", "wf_", xargs, count)

    def look(self, headers: Iterable[str], body: Mapping[str, Any]) -> None:
        """Look at the names in a request, which takes next to nothing where all were seen before.

        Args:
            headers: Their names.
            body: The JSON object of the request.
        """
        if not self._headers.fine.issuperset(headers):
            self._headers.look(headers)
        if "metadata" in body or "vllm_xargs" in body:
            for place, members in (
                (self._metadata, body.get("metadata")),
                (self._xargs, body.get("vllm_xargs")),
            ):
                if isinstance(members, dict) and not place.fine.issuperset(members):
                    place.look(members)


class _Place:
    """One place where our fields may stand.

    Args:
        where: What it is called.
        prefix: What is taken for ours begins so, however its letters are written.
        known: Our fields there; those of headers may be written in any case.
        count: See `Spelling`.
    """

    def __init__(
        self, where: str, prefix: str, known: Iterable[str], count: Callable[[str, str], None]
    ) -> None:
        self._where = where
        self._prefix = prefix
        self._any_case = where == "header"
        self._known = {name.lower(): name for name in known}
        self._like_run = [name for name in self._known if name.startswith(prefix)]
        self._count = count
        self._told: dict[str, str] = {}
        """Names that are not ours, and what each is told as."""
        self.fine: set[str] = set()
        """Names that were seen and are ours, or nobody could mean ours by."""

    def look(self, names: Iterable[str]) -> None:
        """Judge the names that were not seen before, so many at most; count those not ours."""
        new = [name for name in names if name not in self.fine and name not in self._told]
        for name in islice(new, _MAX_JUDGED):
            self._judge(name)
        for name in names:
            if name in self._told:
                self._count(self._where, self._told[name])

    def _judge(self, name: str) -> None:
        lower = name.lower()
        if lower in self._known and (self._any_case or name == self._known[lower]):
            self._take_as_fine(name)
            return
        close = []
        if len(lower) <= _MAX_LENGTH:
            close = get_close_matches(lower, self._like_run, n=1, cutoff=_CLOSE)
        if not close and not lower.startswith(self._prefix):
            self._take_as_fine(name)
        elif len(self._told) < MAX_TOLD:
            shown = (name if is_label(name) else ascii(name)[1:-1])[:_MAX_LENGTH]
            self._told[name] = shown
            _logger.warning(
                "%s %s: not a name that is known here, it has no effect%s",
                self._where,
                shown,
                f"; was {self._known[close[0]]} meant?" if close else "",
            )
        else:
            self._count(self._where, OTHER)

    def _take_as_fine(self, name: str) -> None:
        if len(self.fine) >= _MAX_FINE:
            self.fine.clear()
        self.fine.add(name)
