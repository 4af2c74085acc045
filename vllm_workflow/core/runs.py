"""How much service each run has had, which is what Autellix orders calls by.

Nothing here reads a clock: runs are forgotten by count, the one longest without a call first,
so the same sequence of calls leads to the same memory in a router, a simulation and a replay.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, final

from vllm_workflow.core.types import StageRequest
from vllm_workflow.core.value import Value

MAX_RUNS: Final = 4_096
"""Runs remembered at most: their names come from clients, and many never say that they end."""

_RunKey = tuple[str, str]
"""(tenant, workflow_id): the runs of two tenants are two runs."""


_FIELDS = ("total_s", "path_s")


@final
class Attained(Value):
    """Service of a run's calls that ended well, in seconds."""

    __slots__ = _FIELDS
    _fields = _FIELDS

    total_s: Final[float]
    """Summed."""
    path_s: Final[float]
    """Along the longest path: of calls that ran side by side, the longest counts."""

    def __init__(self, total_s: float = 0.0, path_s: float = 0.0) -> None:
        self.total_s = total_s
        self.path_s = path_s


_NOTHING: Final = Attained()


class AttainedService:
    """Keeps what each run has attained, from its first call until the final one ended well."""

    def __init__(self) -> None:
        self._runs: OrderedDict[_RunKey, Attained] = OrderedDict()
        """The run longest without a call comes first."""

    def __len__(self) -> int:
        return len(self._runs)

    def of(self, request: StageRequest) -> Attained:
        """What the run of a call has attained by now; nothing for an unknown or nameless one."""
        return self._runs.get((request.tenant_id, request.workflow_id), _NOTHING)

    def begin(self, request: StageRequest) -> None:
        """Note that a call begins; the run idle longest makes room for a new one."""
        if not request.workflow_id:
            return
        key = (request.tenant_id, request.workflow_id)
        if key in self._runs:
            self._runs.move_to_end(key)
            return
        self._runs[key] = _NOTHING
        if len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)

    def end(self, request: StageRequest, service_s: float) -> None:
        """Credit a call that ended well to its run.

        The path to it is taken to be the longest that had ended when it was predicted. Like
        the process table of Autellix (arXiv 2502.13965) this is one number per run and needs
        no graph; a call that only a shorter branch revealed inherits the longer one's. What
        has been forgotten stays so.

        Args:
            request: With `attained_path_s` as it was predicted with.
            service_s: Without the time it waited.
        """
        key = (request.tenant_id, request.workflow_id)
        before = self._runs.get(key)
        if before is None:
            return
        if request.final:
            del self._runs[key]
            return
        self._runs[key] = Attained(
            total_s=before.total_s + service_s,
            path_s=max(before.path_s, request.attained_path_s + service_s),
        )
