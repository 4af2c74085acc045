"""What a dispatcher tells of calls: several of these are made per call, see `core.value`.

Those that are rare, and how all are written down, are in `core.events`.
"""

from __future__ import annotations

from typing import Final, final

from vllm_workflow.core.types import Decision, Outcome, StageRequest
from vllm_workflow.core.value import Value

_SUBMITTED_FIELDS = ("now", "request", "num_prompt_bytes", "exclude", "decision")


@final
class Submitted(Value):
    """A call came, and was bound to an instance or began to wait."""

    __slots__ = _SUBMITTED_FIELDS
    _fields = _SUBMITTED_FIELDS

    now: Final[float]
    request: Final[StageRequest]
    num_prompt_bytes: Final[int]
    exclude: Final[tuple[str, ...]]
    decision: Final[Decision | None]
    """None: it waits."""

    def __init__(
        self,
        now: float,
        request: StageRequest,
        num_prompt_bytes: int,
        exclude: tuple[str, ...],
        decision: Decision | None,
    ) -> None:
        self.now = now
        self.request = request
        self.num_prompt_bytes = num_prompt_bytes
        self.exclude = exclude
        self.decision = decision


_POLLED_FIELDS = ("now", "decisions")


@final
class Polled(Value):
    """Calls that had waited were bound to instances."""

    __slots__ = _POLLED_FIELDS
    _fields = _POLLED_FIELDS

    now: Final[float]
    decisions: Final[tuple[Decision, ...]]

    def __init__(self, now: float, decisions: tuple[Decision, ...]) -> None:
        self.now = now
        self.decisions = decisions


_WITHDRAWN_FIELDS = ("request_id", "refused")


@final
class Withdrawn(Value):
    """A call that waited was given up."""

    __slots__ = _WITHDRAWN_FIELDS
    _fields = _WITHDRAWN_FIELDS

    request_id: Final[str]
    refused: Final[bool]
    """By the router, and its run with it; else its client left."""

    def __init__(self, request_id: str, refused: bool = False) -> None:
        self.request_id = request_id
        self.refused = refused


_SETTLED_FIELDS = ("outcome",)


@final
class Settled(Value):
    """A call ended, well or not."""

    __slots__ = _SETTLED_FIELDS
    _fields = _SETTLED_FIELDS

    outcome: Final[Outcome]

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
