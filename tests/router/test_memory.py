"""What the router keeps of runs that have come and gone does not grow with their number."""

from __future__ import annotations

import gc
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from tests.builders import dispatcher, instance, outcome, stage_request
from vllm_workflow.core import (
    admission,
    admissions,
    fleet,
    holders,
    lengths,
    pace,
    prefix,
    remaining,
    tenant_ledger,
    transitions,
)
from vllm_workflow.core import runs as core_runs
from vllm_workflow.core.config import PRESETS
from vllm_workflow.core.tenants import TenantsConfig
from vllm_workflow.core.types import StageRequest
from vllm_workflow.router import board
from vllm_workflow.router.board import Board
from vllm_workflow.router.runs import Run, Runs
from vllm_workflow.router.wire import RunInfo

BOUND = 16
"""Instead of thousands, so that it is reached at once."""
BOUNDS: tuple[tuple[types.ModuleType, str], ...] = (
    (admission, "_MAX_CLASSES"),
    (admissions, "_MAX_MODELS"),
    (board, "MAX_RUNS"),
    (core_runs, "MAX_RUNS"),
    (holders, "_MAX_PIECES"),
    (lengths, "_MAX_STAGES"),
    (pace, "MAX_IDLE_RUNS"),
    (prefix, "MAX_IDLE_SEGMENTS_UNBOUNDED"),
    (remaining, "MAX_IDLE_RUNS"),
    (remaining, "MAX_RUNS"),
    (remaining, "MAX_STAGES"),
    (tenant_ledger, "MAX_TENANTS"),
    (transitions, "MAX_WORKFLOWS"),
)
NUM_RUNS = 100
SLACK = NUM_RUNS // 10
"""Values that wait to be sorted into histograms, and buckets; a leak is one for each of 400 runs,
or of those of one kind."""


@pytest.fixture
def low_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in BOUNDS:
        monkeypatch.setattr(module, name, BOUND)


class Router:
    """All that remembers runs, without sockets; time passes, but too little for anything to be
    forgotten because of it."""

    def __init__(self, *, policy: str = "workflow", num_instances: int = 2, **more: Any) -> None:
        self.now = 1000.0
        self.board = Board(lambda: self.now)
        self.dispatcher = dispatcher(
            *(instance(f"i{number}") for number in range(num_instances)),
            config=PRESETS[policy],
            record=self.board.record,
            **more,
        )
        self.ended: int = 0
        self.runs = Runs(self._count, max_idle=BOUND)
        self._number = 0

    def _count(self, run: Run) -> None:
        self.ended += 1

    def begin(self, info: RunInfo, *, model: str = "") -> Callable[[bool], None]:
        """Make a call, which some instance takes; returns what ends it."""
        self.now += 0.001
        self._number += 1
        run = self.runs.begin(info, self.now)
        request = self._predicted(info, run, model)
        decision = self.dispatcher.submit(request, now=self.now, num_prompt_bytes=400)
        for each in [decision] if decision else self.dispatcher.poll(self.now):
            decision = each if each.request_id == request.request_id else decision
        assert decision is not None
        chosen = decision.chosen.instance_id

        def end(ok: bool = True) -> None:
            self.now += 0.001
            self.dispatcher.settle(
                outcome(
                    request.request_id,
                    chosen,
                    ok=ok,
                    e2el_s=0.01,
                    num_prompt_tokens=100,
                    num_output_tokens=10,
                )
            )
            self.dispatcher.poll(self.now)
            self.runs.end(info, run, self.now, ok=ok)

        return end

    def _predicted(self, info: RunInfo, run: Run, model: str) -> StageRequest:
        request = stage_request(
            f"call-{self._number}",
            arrival_time=self.now,
            deadline=run.deadline,
            run_arrival_time=run.arrival_time,
            workflow_id=info.workflow_id,
            workflow=info.workflow,
            stage=info.stage,
            tenant_id=info.tenant_id,
            model=model,
            final=info.final,
        )
        head = ((hash(("template", 0)), 2048), (hash(("run", info.workflow_id)), 2048))
        return self.dispatcher.predict(request, num_prompt_bytes=400, max_tokens=16, head=head)

    def size(self) -> int:
        """Entries of all containers within reach."""
        self.dispatcher.predictor.learned.to_mapping()  # sorts in what waits for that
        seen, found, total = set[int](), [self.dispatcher, self.board, self.runs], 0
        while found:
            each = found.pop()
            if id(each) in seen or isinstance(each, NOT_KEPT):
                continue
            seen.add(id(each))
            total += len(each) if isinstance(each, CONTAINERS) else 0
            found.extend(gc.get_referents(each))
        return total


CONTAINERS = (dict, list, set, deque)
NOT_KEPT = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def run_of(number: int, **fields: Any) -> RunInfo:
    fields = {"workflow": "w", "stage": "first", "slo_ms": 1e6, **fields}
    return RunInfo(workflow_id=f"run-{number}", **fields)


def says_that_it_ends(router: Router, number: int) -> None:
    for stage in ("first", "second"):
        router.begin(run_of(number, stage=stage))()
    router.begin(run_of(number, stage="last", final=True))()


def never_says_that_it_ends(router: Router, number: int) -> None:
    for stage in ("first", "second"):
        router.begin(run_of(number, stage=stage))()


def ends_beside_others(router: Router, number: int) -> None:
    calls = [router.begin(run_of(number, stage=f"{i}", final=i == 1)) for i in range(3)]
    for end in (calls[1], calls[0], calls[2]):
        end()


def ends_beside_one_that_fails(router: Router, number: int) -> None:
    fails, last = router.begin(run_of(number)), router.begin(run_of(number, final=True))
    last()
    fails(False)


def fails_at_once(router: Router, number: int) -> None:
    router.begin(run_of(number))(False)


def fails_at_the_end(router: Router, number: int) -> None:
    router.begin(run_of(number))()
    router.begin(run_of(number, stage="last", final=True))(False)


def has_no_name(router: Router, number: int) -> None:
    router.begin(RunInfo(slo_ms=1e6))()


def invents_everything(router: Router, number: int) -> None:
    info = run_of(number, workflow=f"w{number}", stage=f"s{number}", tenant_id=f"t{number}")
    router.begin(info, model=f"m{number}")()


KINDS = (
    says_that_it_ends,
    never_says_that_it_ends,
    ends_beside_others,
    ends_beside_one_that_fails,
    fails_at_once,
    fails_at_the_end,
    has_no_name,
    invents_everything,
)


def sizes(router: Router, kind: Callable[[Router, int], None]) -> tuple[int, int]:
    """After so many runs, and after five times as many."""
    for number in range(NUM_RUNS):
        kind(router, number)
    before = router.size()
    for number in range(NUM_RUNS, 5 * NUM_RUNS):
        kind(router, number)
    return before, router.size()


@pytest.mark.usefixtures("low_bounds")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"policy": "hexgen"},
        {"num_instances": fleet.LARGE_FLEET + 1},
        {"tenants": TenantsConfig()},
    ],
    ids=["workflow", "hexgen", "large fleet", "tenants"],
)
def test_five_times_the_runs_leave_no_more_behind(
    more: dict[str, Any], kind: Callable[[Router, int], None]
) -> None:
    before, after = sizes(Router(**more), kind)

    assert after <= before + SLACK


@pytest.mark.parametrize(
    "kind", [says_that_it_ends, ends_beside_others, ends_beside_one_that_fails]
)
def test_of_a_run_that_says_that_it_ends_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[Router, int], None]
) -> None:
    for name in ("board.MAX_RUNS", "prefix.MAX_IDLE_SEGMENTS_UNBOUNDED"):  # what is shown, and KV
        module, _, attribute = name.partition(".")
        monkeypatch.setattr({"board": board, "prefix": prefix}[module], attribute, BOUND)

    before, after = sizes(Router(), kind)

    assert after <= before + SLACK


def test_the_walk_sees_what_is_kept() -> None:
    before, after = sizes(Router(), never_says_that_it_ends)

    assert after > before + 4 * NUM_RUNS
