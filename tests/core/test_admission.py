import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import stage_request
from vllm_workflow.core.admission import Admission, Held, run_key
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.pace import MAX_IDLE_S, Pace
from vllm_workflow.core.types import StageRequest


def run(name: str, *, came: float = 0.0, slo_s: float = 40.0, rest_s: float = 9.0) -> StageRequest:
    """The first call of a run that needs 10 s on an idle fleet."""
    return stage_request(
        f"{name}/first",
        workflow_id=name,
        workflow="w",
        arrival_time=came,
        run_arrival_time=came,
        deadline=came + slo_s,
        rest_s=rest_s,
    )


def end(pace: Pace, request: StageRequest, *, now: float, idle_s: float = 1.0) -> None:
    pace.closed(run_key(request), request, end_time=now, idle_s=idle_s, ok=True)


def busy(num_runs: int, *, slowdown: float) -> Pace:
    """As many runs under way at 0 s, each with a call; what was seen says how slow that is."""
    pace = Pace()
    for round_ in range(20):  # long ago, and outweighs what is predicted
        calls = [run(f"past-{round_}-{i}", rest_s=0.0) for i in range(num_runs)]
        for call in calls:
            pace.opened(run_key(call), call, -1e4 * (20 - round_))
        for call in calls:
            end(pace, call, now=-1e4 * (20 - round_) + 500.0 * slowdown, idle_s=500.0)
    for i in range(num_runs):
        call = run(f"now-{i}")
        pace.opened(run_key(call), call, 0.0)
    return pace


def door(
    pace: Pace, *, margin: float = 0.0, max_hold_share: float = 0.2, relegated_share: float = 0.05
) -> Admission:
    """Runs are promised four times what they need."""
    config = PolicyConfig(
        late_binding=True,
        relegate=True,
        relegation_margin=margin,
        max_hold_share=max_hold_share,
        relegated_share=relegated_share,
    )
    admission = Admission(pace, config)
    for _ in range(50):
        admission.arrived(run("earlier"), 1.0, 0.0)
    return admission


def hold(admission: Admission, *requests: StageRequest) -> None:
    for request in requests:
        admission.hold(Held(request, 0, ()))


def begun(admission: Admission, now: float, *, is_idle: bool = False) -> list[str]:
    return [h.request.workflow_id for h in admission.beginning(now, is_idle=is_idle)]


def test_a_run_begins_at_once_while_all_can_be_on_time() -> None:
    admission = door(busy(10, slowdown=3.0))
    hold(admission, run("new"))

    assert begun(admission, 0.0) == ["new"]


def test_a_run_waits_when_it_would_make_runs_late() -> None:
    admission = door(busy(10, slowdown=5.0))
    hold(admission, run("new"))

    assert begun(admission, 0.0) == []
    assert len(admission) == 1


def test_a_margin_is_kept() -> None:
    admission = door(busy(10, slowdown=3.0), margin=0.5)
    hold(admission, run("new"))

    assert begun(admission, 0.0) == []


def test_the_run_that_came_first_begins_first_while_it_can_be_on_time() -> None:
    admission = door(busy(10, slowdown=2.0))
    hold(admission, run("first"), run("second", came=1.0))

    assert begun(admission, 1.0) == ["first"]


def test_under_overload_the_run_that_came_last_begins() -> None:
    admission = door(busy(10, slowdown=3.3))
    hold(admission, run("first"), run("middle", came=10.0), run("last", came=20.0))

    assert begun(admission, 20.0) == ["last"]


def test_now_and_then_a_run_begins_that_is_late_so_that_none_starves() -> None:
    admission = door(busy(10, slowdown=3.3), relegated_share=0.25)
    hold(admission, run("late", came=-60.0))
    order = []
    for number in range(4):
        hold(admission, run(f"r{number}"))
        order += begun(admission, 0.0)

    assert order == ["r0", "r1", "r2", "late"]
    assert admission.num_relegated == 1


def test_room_that_no_run_can_use_in_time_is_for_those_that_are_late() -> None:
    admission = door(busy(10, slowdown=2.0))
    hold(admission, run("late", came=-60.0))

    assert begun(admission, 0.0) == ["late"]


def test_an_idle_fleet_takes_any_run() -> None:
    admission = door(Pace())
    hold(admission, run("late", came=-60.0))

    assert begun(admission, 0.0, is_idle=True) == ["late"]


def test_a_favoured_run_begins_before_all_others() -> None:
    admission = door(busy(10, slowdown=2.0))
    hold(admission, run("first"), run("favoured", came=1.0)._replace(priority=-1))

    assert begun(admission, 1.0) == ["favoured"]


def test_calls_of_one_run_begin_together() -> None:
    admission = door(busy(10, slowdown=2.0))
    twins = run("twins")
    hold(admission, twins, twins._replace(request_id="twins/second"), run("other"))

    assert begun(admission, 0.0) == ["twins", "twins"]


def test_a_promise_that_nobody_can_keep_does_not_hold_up_others() -> None:
    admission = door(busy(10, slowdown=3.0))
    for _ in range(200):
        admission.arrived(run("impossible", slo_s=1.0), 1.0, 0.0)
    hold(admission, run("new"))

    assert begun(admission, 0.0) == ["new"]


def test_runs_with_hours_to_spare_do_not_crowd_out_those_with_little() -> None:
    admission = door(busy(10, slowdown=9.0))
    lax = run("lax", slo_s=10_000.0)._replace(workflow="batch")
    for _ in range(20):
        admission.arrived(lax, 1.0, 0.0)
        admission.arrived(run("tight"), 1.0, 0.0)
    hold(admission, lax)

    assert begun(admission, 0.0) == []


def test_a_call_that_leaves_is_forgotten() -> None:
    admission = door(busy(10, slowdown=4.0))
    hold(admission, run("stays"), run("leaves"))

    left = admission.leave("leaves/first")

    assert left is not None
    assert admission.leave("leaves/first") is None
    assert [h.request.workflow_id for h in admission.calls()] == ["stays"]


def test_the_longer_the_line_the_longer_the_wait() -> None:
    admission = door(busy(10, slowdown=4.0))
    hold(admission, run("a"))
    alone_s = admission.wait_s(run("another"))
    hold(admission, run("b"), run("c"), run("c")._replace(request_id="c/second"))

    # Ten runs of 40 s: one ends every 4 s.
    assert alone_s == pytest.approx(4.0, rel=0.1)
    assert admission.wait_s(run("another")) == pytest.approx(3 * alone_s)


def test_a_run_alone_is_not_slowed_down() -> None:
    assert busy(10, slowdown=4.0).slowdown(1) == 1.0


def ended_runs(
    took_s: float, *, promised_s: float = 1e4, num_runs: int = 200, held_s: float = 0.0
) -> Pace:
    """Runs one after the other, each taken to need 10 s."""
    pace = Pace()
    for number in range(num_runs):
        begin = number * 1e5
        call = run(f"past-{number}", rest_s=0.0, came=begin - held_s, slo_s=promised_s)
        pace.opened(run_key(call), call, begin, 10.0)
        end(pace, call, now=begin + took_s, idle_s=took_s)
    return pace


def test_runs_that_take_longer_than_their_calls_tell_are_expected_to() -> None:
    assert ended_runs(10.0).stretch(10.0) == pytest.approx(1.0)
    assert ended_runs(20.0).stretch(10.0) == pytest.approx(2.0, rel=0.1)


def test_a_few_runs_do_not_decide_what_runs_take() -> None:
    assert ended_runs(20.0, num_runs=2).stretch(10.0) == pytest.approx(14.0 / 12.0, rel=0.02)


def test_of_a_late_run_what_makes_it_late_counts() -> None:
    late, on_time = ended_runs(500.0, promised_s=20.0), ended_runs(20.0)

    assert late.stretch(10.0) == pytest.approx(on_time.stretch(10.0))


def test_a_run_that_waited_to_begin_tells_nothing() -> None:
    assert ended_runs(50.0, promised_s=100.0, held_s=6.0).stretch(10.0) == 1.0
    assert ended_runs(50.0, promised_s=100.0, held_s=4.0).stretch(10.0) > 4.0


def seen_runs(took_s: float, *, num_under_way: int, slowdown: float) -> Pace:
    """As `busy`, after runs one by one that took so long, and were taken to need 10 s."""
    pace = busy(num_under_way, slowdown=slowdown)
    for number in range(100):
        call = run(f"past-{number}", rest_s=0.0, came=1e4 + number * 1e3, slo_s=1e3)
        pace.opened(run_key(call), call, call.arrival_time, 10.0)
        idle_s = took_s / pace.slowdown(num_under_way + 1)  # calls tell nothing new
        end(pace, call, now=call.arrival_time + took_s, idle_s=idle_s)
    return pace


def test_fewer_runs_begin_when_those_that_ended_took_longer_than_expected() -> None:
    another = run("another", came=2e5)

    assert door(seen_runs(30.0, num_under_way=10, slowdown=3.0)).can_begin(another, 2e5)
    assert not door(seen_runs(60.0, num_under_way=10, slowdown=3.0)).can_begin(another, 2e5)


def test_more_runs_begin_when_those_that_ended_took_less_unless_many_wait() -> None:
    another = run("another", came=2e5)
    as_expected, less = (
        door(seen_runs(took_s, num_under_way=10, slowdown=4.2)) for took_s in (45.0, 5.0)
    )
    alone = less.can_begin(another, 2e5)
    for number in range(20):
        less.hold(Held(run(f"waiting-{number}"), 0, ()))

    assert alone
    assert not as_expected.can_begin(another, 2e5)
    assert not less.can_begin(another, 2e5)


def test_a_run_counts_between_its_calls_but_not_for_ever() -> None:
    pace, call = Pace(), run("r")
    pace.opened(run_key(call), call, 0.0)
    end(pace, call, now=1.0)
    between = pace.num_runs
    pace.tick(1.0 + MAX_IDLE_S)

    assert between == 1
    assert pace.num_runs == 0


def test_a_run_that_makes_no_call_for_long_is_forgotten() -> None:
    pace = Pace()
    for number, rest_s in enumerate([0.0, 10.0]):
        call = run(f"r{number}", rest_s=rest_s)
        pace.opened(run_key(call), call, 0.0)
        end(pace, call, now=1.0)
    between = len(pace)
    pace.tick(1.0 + MAX_IDLE_S)

    assert between == 2
    assert len(pace) == 0


def test_a_run_ends_with_its_final_call_and_those_beside_it() -> None:
    pace, final = Pace(), run("r")._replace(final=True)
    beside = run("r")._replace(request_id="beside")
    for call in (beside, final):
        pace.opened(run_key(call), call, 0.0)
    end(pace, final, now=1.0)
    before = pace.num_runs
    end(pace, beside, now=2.0)

    assert (before, pace.num_runs, len(pace)) == (1, 0, 0)


def test_a_run_that_is_known_to_end_counts_no_longer() -> None:
    pace, call = Pace(), run("r", rest_s=0.0)
    pace.opened(run_key(call), call, 0.0)
    end(pace, call, now=1.0)

    assert pace.num_runs == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["open", "end", "fail", "wait"]), st.integers(0, 5)), max_size=80
    )
)
def test_runs_under_way_are_those_with_calls_open_or_soon_to_come(
    script: list[tuple[str, int]],
) -> None:
    pace, now, calls = Pace(), 0.0, list[StageRequest]()
    for number, (what, pick) in enumerate(script):
        now += 0.1
        if what == "open":
            call = run(f"run-{pick}", rest_s=float(pick % 2))
            call = call._replace(request_id=f"c{number}", final=pick == 5)
            pace.opened(run_key(call), call, now)
            calls.append(call)
        elif what == "wait":
            now += 20.0 * pick
        elif calls:
            call = calls.pop(pick % len(calls))
            ok = what == "end"
            time = now if ok else math.nan
            pace.closed(run_key(call), call, end_time=time, idle_s=0.1, ok=ok)
        num_open = len({c.workflow_id for c in calls})
        assert num_open <= pace.num_runs <= 6
        assert pace.slowdown(pace.num_runs) >= 1.0
    for call in calls:
        pace.closed(run_key(call), call, end_time=now, idle_s=0.1, ok=True)
    pace.tick(now + MAX_IDLE_S)

    assert pace.num_runs == 0
