"""Which pieces of prompts the blocks that an instance reports stand for."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.builders import stage_request
from tests.router.kv_messages import (
    HEAD,
    SIZE,
)
from vllm_workflow.core.prefix import Segment
from vllm_workflow.router.kv_blocks import MAX_CALLS, Blocks


def store(blocks: Blocks, session_id: str | None, *hashes: int, parent: int | None = None) -> Any:
    return blocks.stored(session_id, hashes, parent=parent, block_size=SIZE)


def test_a_piece_is_gone_with_the_block_that_it_ends_in() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 10, 11)
    store(blocks, "a", 12, 13, 14, parent=11)
    blocks.ended("a", 80)

    assert blocks.removed([14]) == []
    assert blocks.removed([13]) == [2]
    assert blocks.removed([12, 11]) == [1]
    assert len(blocks) == 0


def test_blocks_that_a_call_found_in_the_cache_are_its_too() -> None:
    blocks = Blocks()
    for name in "ab":
        blocks.sent(
            stage_request(name, num_prompt_tokens=80, prefix=(HEAD[0], Segment(ord(name), 32)))
        )
    store(blocks, "a", 10, 11, 12, 13, 14)
    store(blocks, "b", 10, 11)
    store(blocks, "b", 22, 23, 24, parent=11)
    blocks.ended("b", 80)
    blocks.ended("a", 80)

    assert blocks.removed([23]) == [ord("b")]
    assert blocks.removed([13]) == [ord("a")]
    assert blocks.removed([11]) == [1]


def test_a_prompt_of_more_tokens_than_was_guessed_ends_in_later_blocks() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", *range(10, 20))
    blocks.ended("a", 160)

    assert blocks.removed([11, 12]) == []
    assert blocks.removed([13]) == [1]
    assert blocks.removed([17]) == [2]


def test_reports_may_come_after_the_answer() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 10, 11)
    assert blocks.ended("a", 80) == []
    store(blocks, "a", 12, 13, 14, parent=11)

    assert blocks.removed([13]) == [2]


def test_what_was_dropped_before_the_call_had_ended_is_gone_at_its_end() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 10, 11, 12, 13, 14)
    assert blocks.removed([13]) == []

    assert blocks.ended("a", 80) == [2]


def test_blocks_whose_beginning_was_not_reported_say_nothing() -> None:
    blocks = Blocks()
    blocks.sent(stage_request("a", num_prompt_tokens=80, prefix=HEAD))
    store(blocks, "a", 12, 13, 14, parent=11)
    blocks.ended("a", 80)

    assert blocks.removed([11, 12, 13, 14]) == []


def test_calls_that_never_end_are_forgotten() -> None:
    blocks = Blocks()
    for number in range(MAX_CALLS + 1):
        blocks.sent(stage_request(str(number), num_prompt_tokens=80, prefix=HEAD))
    for name, first in (("0", 10), ("1", 20)):
        store(blocks, name, *range(first, first + 5))
        blocks.ended(name, 80)

    assert blocks.removed([13]) == []
    assert blocks.removed([23]) == [2]


hashes = st.integers(0, 12)
reports = st.one_of(
    st.tuples(st.just("sent"), st.sampled_from("abc"), st.integers(1, 90)),
    st.tuples(st.just("ended"), st.sampled_from("abc"), st.none() | st.integers(1, 200)),
    st.tuples(st.just("stored"), st.sampled_from("abcd"), st.lists(hashes), st.none() | hashes),
    st.tuples(st.just("removed"), st.lists(hashes)),
    st.tuples(st.just("cleared")),
    st.tuples(st.just("lost")),
)


@given(st.lists(reports, max_size=40))
def test_whatever_is_reported_only_pieces_of_calls_that_were_sent_are_let_go(
    script: list[tuple[Any, ...]],
) -> None:
    blocks = Blocks()
    sent: set[int] = set()
    for what, *rest in script:
        gone: list[int] = []
        if what == "sent":
            name, num_tokens = rest
            head = (Segment(ord(name), 32), Segment(ord(name) + 1000, 32))
            sent |= {segment.chain_hash for segment in head}
            blocks.sent(stage_request(name, num_prompt_tokens=num_tokens, prefix=head))
        elif what == "ended":
            gone = blocks.ended(*rest)
        elif what == "stored":
            name, each, parent = rest
            gone = store(blocks, name, *each, parent=parent)
        elif what == "removed":
            gone = blocks.removed(*rest)
        else:
            getattr(blocks, what)()
        assert set(gone) <= sent
    blocks.removed(range(13))
    assert len(blocks) == 0
