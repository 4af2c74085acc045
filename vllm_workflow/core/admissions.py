"""The runs that wait to begin, of all models."""

from __future__ import annotations

import math
from itertools import islice
from typing import Final

from vllm_workflow.core.admission import Admission, Demand, Held
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.pace import Pace

_INF: Final = math.inf

_MAX_MODELS: Final = 256
"""Models whose runs are followed, unless more have runs under way: names come from clients."""
_MAX_DROP_TRIES: Final = 16
"""Models looked at for one to forget when another comes."""


class Admissions:
    """One `Admission` for each model. Costs nothing per call while no run waits to begin.

    Args:
        paces: What was learned of the runs of each model; kept within bounds here.
        config: Of the admissions.
        demands: What runs of each model are promised and need; kept within bounds likewise.
    """

    def __init__(
        self, paces: dict[str, Pace], config: PolicyConfig, demands: dict[str, Demand]
    ) -> None:
        self.holding: dict[str, Admission] = {}
        """Those in which a run waits to begin, by model."""
        self.paces = paces
        self._admissions: dict[str, Admission] = {}
        self._config = config
        self._demands = demands
        self._num_relegated_before = 0
        """In admissions that were forgotten."""

    def __len__(self) -> int:
        """First calls of runs that have not begun."""
        num_calls = 0
        for admission in self.holding.values():
            num_calls += len(admission)
        return num_calls

    @property
    def next_expiry(self) -> float:
        """Instant from which a run that waits may begin though nothing has happened."""
        time = _INF
        for admission in self.holding.values():
            time = min(time, admission.pace.next_expiry)
        return time

    @property
    def num_relegated(self) -> int:
        """Runs that have begun although they could not be on time any more."""
        num_runs = self._num_relegated_before
        for admission in self._admissions.values():
            num_runs += admission.num_relegated
        return num_runs

    def get(self, model: str) -> Admission | None:
        return self._admissions.get(model)

    def of(self, model: str, now: float) -> Admission:
        """The admission of a model; a new one may push out one that is not in use."""
        admission = self._admissions.get(model)
        if admission is None:
            if model not in self.paces and len(self.paces) >= _MAX_MODELS:
                self._forget_a_model(now)
            admission = self._admissions[model] = self._made(
                self.paces.setdefault(model, Pace()), self._demands.setdefault(model, Demand())
            )
        return admission

    def _made(self, pace: Pace, demand: Demand) -> Admission:
        return Admission(pace, self._config, demand=demand)

    def hold(self, held: Held, now: float) -> None:
        """Let a run wait to begin."""
        model = held.request.model
        admission = self.holding[model] = self.of(model, now)
        admission.hold(held)

    def beginning(self, model: str, now: float, *, is_idle: bool) -> list[Held]:
        """As `Admission.beginning`, of one in which a run waits or has just begun."""
        admission = self.holding.get(model)
        if admission is None:
            return []
        begun = admission.beginning(now, is_idle=is_idle)
        if not len(admission):
            del self.holding[model]
        return begun

    def leave(self, request_id: str) -> Held | None:
        """Take a call out; None if it does not wait here."""
        for model, admission in self.holding.items():
            held = admission.leave(request_id)
            if held is not None:
                if not len(admission):
                    del self.holding[model]
                return held
        return None

    def _forget_a_model(self, now: float) -> None:
        """Drop what was learned of the runs of one that has none; those in use go to the end."""
        for model in list(islice(self.paces, _MAX_DROP_TRIES)):
            pace = self.paces.pop(model)
            pace.tick(now)
            if pace.is_unused and model not in self.holding:
                self._demands.pop(model, None)
                admission = self._admissions.pop(model, None)
                if admission is not None:
                    self._num_relegated_before += admission.num_relegated
                return
            self.paces[model] = pace
