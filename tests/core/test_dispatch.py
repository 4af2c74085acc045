from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import candidate, stage_request
from vllm_workflow.core.dispatch import (
    UNDRAWN_COST,
    DispatchPolicy,
    Hexgen,
    LeastOutstanding,
    PowerOfTwo,
    PredictedFinish,
    RoundRobin,
)
from vllm_workflow.core.types import Candidate

seconds = st.floats(0.001, 1e3)
counts = st.integers(0, 100)
fleets = st.lists(
    st.builds(
        lambda queue, prefill, decode, harm, num, work: (queue, prefill, decode, harm, num, work),
        seconds,
        seconds,
        seconds,
        seconds,
        counts,
        seconds,
    ),
    min_size=1,
    max_size=6,
).map(
    lambda rows: [
        candidate(
            f"i{i}",
            queue_s=q,
            prefill_s=p,
            decode_s=d,
            harm_s=h,
            num_outstanding=n,
            outstanding_s=w,
        )
        for i, (q, p, d, h, n, w) in enumerate(rows)
    ]
)


def choose(policy: DispatchPolicy, candidates: Sequence[Candidate]) -> Candidate:
    costs = policy.costs(stage_request(), candidates)
    assert len(costs) == len(candidates)
    return candidates[costs.index(min(costs))]


@pytest.mark.parametrize("policy", [LeastOutstanding(), PredictedFinish()])
@given(candidates=fleets, data=st.data())
def test_a_losing_candidate_changes_nothing(
    policy: DispatchPolicy, candidates: list[Candidate], data: st.DataObject
) -> None:
    winner = choose(policy, candidates)
    losers = [c for c in candidates if c is not winner]
    kept = data.draw(st.lists(st.sampled_from(losers), unique_by=id)) if losers else []
    without = [c for c in candidates if c is winner or c in kept]

    assert choose(policy, without) is winner


@given(turns=st.integers(0, 20), candidates=fleets, data=st.data())
def test_a_losing_candidate_changes_no_turn(
    turns: int, candidates: list[Candidate], data: st.DataObject
) -> None:
    all_of_them, some_of_them = RoundRobin(), RoundRobin()
    for _ in range(turns):
        assert choose(all_of_them, candidates) is choose(some_of_them, candidates)
    losers_kept = data.draw(st.sets(st.sampled_from(range(len(candidates)))))
    winner = choose(all_of_them, candidates)

    without = [c for i, c in enumerate(candidates) if c is winner or i in losers_kept]
    assert choose(some_of_them, without) is winner


@given(num_rounds=st.integers(1, 10), num_instances=st.integers(1, 7))
def test_round_robin_gives_each_as_many_turns(num_rounds: int, num_instances: int) -> None:
    policy = RoundRobin()
    candidates = [candidate(f"i{i}", queue_s=float(i)) for i in range(num_instances)]
    turns = Counter(
        choose(policy, candidates).instance_id for _ in range(num_rounds * num_instances)
    )

    assert set(turns.values()) == {num_rounds}


def test_round_robin_stays_fair_when_calls_are_retried_elsewhere() -> None:
    policy = RoundRobin()
    busy, b, c = (candidate(i) for i in ("busy", "b", "c"))
    served = Counter[str]()
    for _ in range(30):
        chosen = choose(policy, [busy, b, c])
        if chosen is busy:
            chosen = choose(policy, [b, c])
        served[chosen.instance_id] += 1

    assert served == {"b": 15, "c": 15}


def test_round_robin_does_not_flood_an_instance_that_comes_back() -> None:
    policy = RoundRobin()
    a, b = candidate("a"), candidate("b")
    for _ in range(10):
        choose(policy, [a])
    turns = Counter(choose(policy, [a, b]).instance_id for _ in range(10))

    assert turns == {"a": 5, "b": 5}


def test_least_outstanding_ignores_seconds() -> None:
    busy = candidate("busy", prefill_s=0.1, num_outstanding=3)
    idle = candidate("idle", prefill_s=9.0, num_outstanding=2)

    assert choose(LeastOutstanding(), [busy, idle]) is idle


def test_hexgen_with_alpha_one_takes_the_fastest_however_busy() -> None:
    fast = candidate("fast", prefill_s=0.5, outstanding_s=60.0)
    slow = candidate("slow", prefill_s=5.0, outstanding_s=0.0)

    assert choose(Hexgen(alpha=1.0), [slow, fast]) is fast


def test_hexgen_with_alpha_zero_takes_the_least_work_however_slow() -> None:
    fast = candidate("fast", prefill_s=0.5, outstanding_s=60.0)
    slow = candidate("slow", prefill_s=5.0, outstanding_s=59.0)

    assert choose(Hexgen(alpha=0.0), [fast, slow]) is slow


@given(candidates=fleets)
def test_the_ends_of_alpha_are_speed_and_work(candidates: list[Candidate]) -> None:
    fastest = choose(Hexgen(alpha=1.0), candidates)
    least = choose(Hexgen(alpha=0.0), candidates)

    assert fastest.service_s <= min(c.service_s for c in candidates) * (1 + 1e-9)
    assert least.outstanding_s <= min(c.outstanding_s for c in candidates) * (1 + 1e-9)


def test_hexgen_scores_as_published() -> None:
    # T̄ = 2, W̄ = 10; score = α·T̄/T − (1 − α)·W/W̄, and the cost is its negative.
    a = candidate("a", prefill_s=1.0, outstanding_s=15.0)
    b = candidate("b", prefill_s=3.0, outstanding_s=5.0)

    costs = Hexgen(alpha=0.3).costs(stage_request(), [a, b])

    assert costs == pytest.approx([-(0.3 * 2 - 0.7 * 1.5), -(0.3 * 2 / 3 - 0.7 * 0.5)])


def test_hexgen_takes_an_idle_fleet_and_a_call_of_no_duration() -> None:
    idle = [candidate("a", prefill_s=0.0), candidate("b", prefill_s=0.0)]

    assert Hexgen().costs(stage_request(), idle) == [0.0, 0.0]


def test_predicted_finish_counts_the_harm_done_to_others() -> None:
    harmful = candidate("harmful", prefill_s=1.0, harm_s=2.0)
    harmless = candidate("harmless", prefill_s=2.0, harm_s=0.0)

    assert choose(PredictedFinish(), [harmful, harmless]) is harmless


@pytest.mark.parametrize("policy", [RoundRobin(), LeastOutstanding(), Hexgen(), PredictedFinish()])
def test_a_tie_goes_to_the_first(policy: DispatchPolicy) -> None:
    first, second = candidate("first"), candidate("second")

    assert choose(policy, [first, second]) is first


@given(candidates=fleets, request_id=st.text(), seed=st.integers(0, 2**70))
def test_of_two_drawn_the_one_with_fewer_calls_wins(
    candidates: list[Candidate], request_id: str, seed: int
) -> None:
    costs = PowerOfTwo(seed).costs(stage_request(request_id), candidates)
    drawn = [c for c, cost in zip(candidates, costs) if cost < UNDRAWN_COST]
    chosen = candidates[costs.index(min(costs))]

    assert len(drawn) == min(2, len(candidates))
    assert chosen.num_outstanding == min(c.num_outstanding for c in drawn)


@given(candidates=fleets, request_id=st.text(), data=st.data())
def test_an_instance_that_was_not_drawn_changes_nothing(
    candidates: list[Candidate], request_id: str, data: st.DataObject
) -> None:
    before = PowerOfTwo().costs(stage_request(request_id), candidates)
    others = [
        c if cost < UNDRAWN_COST else candidate(c.instance_id, num_outstanding=data.draw(counts))
        for c, cost in zip(candidates, before)
    ]
    after = PowerOfTwo().costs(stage_request(request_id), others)

    assert [min(cost, UNDRAWN_COST) for cost in after] == [
        min(cost, UNDRAWN_COST) for cost in before
    ]


def test_every_ordered_pair_is_drawn_as_often() -> None:
    drawn = Counter(PowerOfTwo().draw(f"r{i}", 4) for i in range(12_000))

    assert len(drawn) == 12
    assert all(850 < times < 1150 for times in drawn.values())  # 5 deviations about 1,000


def test_an_idle_fleet_of_two_is_used_evenly() -> None:
    idle = [candidate("a"), candidate("b")]
    costs = (PowerOfTwo().costs(stage_request(f"r{i}"), idle) for i in range(1000))
    chosen = Counter(each.index(min(each)) for each in costs)

    assert 420 < chosen[0] < 580


def test_the_same_request_draws_the_same_pair_and_another_seed_other_ones() -> None:
    def pairs(seed: int) -> list[tuple[int, int]]:
        return [PowerOfTwo(seed).draw(f"r{i}", 8) for i in range(100)]

    assert pairs(1) == pairs(1)
    assert sum(a == b for a, b in zip(pairs(1), pairs(2))) < 20
