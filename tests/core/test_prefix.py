from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core import prefix
from vllm_workflow.core.prefix import Chain, KvLedger, Segment


def chain(*pieces: str, num_tokens: int = 100) -> Chain:
    heads = ["/".join(pieces[: n + 1]) for n in range(len(pieces))]
    return tuple(Segment(hash(head), num_tokens) for head in heads)


def test_a_prompt_seen_before_is_cached_as_far_as_it_is_equal() -> None:
    ledger = KvLedger(10_000)
    ledger.admit("a", chain("template", "schema"), 50)
    ledger.release("a")

    assert ledger.num_cached_tokens(chain("template", "schema")) == 200
    assert ledger.num_cached_tokens(chain("template", "another")) == 100
    assert ledger.num_cached_tokens(chain("another", "schema")) == 0


def test_calls_in_flight_share_the_room_of_their_common_head() -> None:
    ledger = KvLedger(1_000)
    ledger.admit("a", chain("template", "schema"), 50)
    ledger.admit("b", chain("template", "another"), 70)

    assert ledger.num_used_tokens == 300 + 50 + 70
    assert ledger.num_new_tokens(chain("template", "schema"), 10) == 10
    assert ledger.num_new_tokens(chain("template", "third"), 10) == 110


def test_what_nobody_reads_gives_way_the_least_recently_used_first() -> None:
    ledger = KvLedger(350)
    for name in ("first", "second", "third"):
        ledger.admit(name, chain(name), 0)
        ledger.release(name)
    ledger.admit("again", chain("first"), 0)
    ledger.release("again")

    ledger.admit("new", (), 150)

    assert ledger.num_cached_tokens(chain("first")) == 100
    assert ledger.num_cached_tokens(chain("second")) == 0
    assert ledger.num_cached_tokens(chain("third")) == 100


def test_what_a_call_in_flight_reads_is_never_evicted() -> None:
    ledger = KvLedger(100)
    ledger.admit("a", chain("template"), 0)
    ledger.admit("b", (), 500)

    assert ledger.num_cached_tokens(chain("template")) == 100
    assert ledger.num_free_tokens == -500


def test_the_end_of_a_prompt_is_evicted_before_its_head() -> None:
    ledger = KvLedger(200)
    ledger.admit("a", chain("template", "schema"), 0)
    ledger.release("a")

    ledger.admit("b", (), 100)

    assert ledger.num_cached_tokens(chain("template", "schema")) == 100


def test_a_call_that_never_ran_leaves_nothing_behind() -> None:
    ledger = KvLedger(10_000)
    ledger.admit("a", chain("template"), 0)
    ledger.release("a", keep=False)

    assert ledger.num_cached_tokens(chain("template")) == 0


def test_a_restarted_engine_has_an_empty_cache() -> None:
    ledger = KvLedger(10_000)
    ledger.admit("a", chain("template"), 0)
    ledger.release("a")

    ledger.clear()

    assert len(ledger) == 0


@pytest.mark.parametrize(("capacity", "num_kept"), [(inf, 5), (1e9, 10)])
def test_memory_is_bounded_also_where_the_capacity_is_huge_or_not_known(
    monkeypatch: pytest.MonkeyPatch, capacity: float, num_kept: int
) -> None:
    monkeypatch.setattr(prefix, "MAX_IDLE_SEGMENTS", 10)
    monkeypatch.setattr(prefix, "MAX_IDLE_SEGMENTS_UNBOUNDED", 5)
    ledger = KvLedger(capacity)
    for number in range(100):
        ledger.admit("a", chain(str(number)), 5)
        ledger.release("a")

    assert len(ledger) == num_kept


pieces = st.lists(st.sampled_from("abc"), max_size=4).map(lambda p: chain(*p))
steps = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), pieces, st.floats(0, 300), st.booleans()), max_size=40
)


@given(steps=steps, capacity=st.sampled_from([0.0, 250.0, 1e4, inf]))
def test_what_is_taken_is_given_back_whatever_the_order(
    steps: list[tuple[str, Chain, float, bool]], capacity: float
) -> None:
    ledger = KvLedger(capacity)
    live: dict[str, tuple[Chain, float]] = {}
    for name, head, own, keep in steps:
        if name in live:
            ledger.release(name, keep=keep)
            del live[name]
        else:
            room = ledger.num_new_tokens(head, own)
            before = ledger.num_used_tokens
            ledger.admit(name, head, own)
            live[name] = (head, own)
            assert ledger.num_used_tokens == pytest.approx(before + room)
        segments = {s.chain_hash: s.num_tokens for head, _ in live.values() for s in head}
        own_tokens = sum(own for _, own in live.values())
        assert ledger.num_used_tokens == pytest.approx(sum(segments.values()) + own_tokens)
        for head, _ in live.values():
            assert ledger.num_cached_tokens(head) == sum(s.num_tokens for s in head)
    for name in list(live):
        ledger.release(name, keep=False)

    assert ledger.num_used_tokens == 0.0


def test_what_an_instance_says_it_dropped_is_not_cached_unless_a_call_reads_it() -> None:
    ledger = KvLedger(10_000)
    (template, schema), (_, other) = chain("template", "schema"), chain("template", "other")
    ledger.admit("ended", (template, schema), 0)
    ledger.release("ended")
    ledger.admit("running", (template, other), 0)

    assert ledger.forget([template.chain_hash, schema.chain_hash, 12345]) == 1

    assert ledger.num_cached_tokens((template, schema)) == 100
    assert ledger.num_used_tokens == 200
    ledger.release("running")
    assert ledger.forget([template.chain_hash]) == 1
    assert ledger.num_cached_tokens((template, other)) == 0
    assert len(ledger) == 1
