"""Prompts of level 2: two calls share exactly the blocks that their prefixes share."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st

from tests.sim.vllm_builders import block_hashes_of_vllm, call, part, vllm_request
from vllm_workflow.sim.prompts import EOS_TOKEN_ID, Prompts

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BLOCK_SIZE = 4

prefixes = st.lists(
    st.builds(part, st.sampled_from(["a", "b", "c"]), st.integers(0, 9)), max_size=4
).map(tuple)
prompts = st.tuples(prefixes, st.integers(0, 9)).filter(
    lambda p: sum(x.num_tokens for x in p[0]) + p[1]
)


def num_equal(a: list[Any], b: list[Any]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@given(one=prompts, other=prompts, num_answer_tokens=st.integers(0, 9))
def test_blocks_are_equal_exactly_where_vllms_own_hasher_finds_them_equal(
    one: Any, other: Any, num_answer_tokens: int
) -> None:
    factory = Prompts(BLOCK_SIZE)
    ours, theirs = [], []
    for prefix, num_own_tokens in (one, other):
        num_tokens = sum(p.num_tokens for p in prefix) + num_own_tokens
        prompt = factory.make(call(prompt=num_tokens, prefix=prefix))
        request = vllm_request(prompt.token_ids, prompt.hash_blocks)
        for _ in range(num_answer_tokens):
            request.append_output_token_ids(prompt.own_token_id)
        ours.append(request.block_hashes)
        theirs.append(block_hashes_of_vllm(list(request.all_token_ids), BLOCK_SIZE))

    assert [len(hashes) for hashes in ours] == [len(hashes) for hashes in theirs]
    assert num_equal(*ours) == num_equal(*theirs)
    assert len(set(ours[0])) == len(ours[0])


def test_a_prompt_is_its_prefix_and_something_of_its_own() -> None:
    factory = Prompts(BLOCK_SIZE)
    shared = (part("a", 2), part("b", 3))

    one, other = (factory.make(call(prompt=8, prefix=shared)).token_ids for _ in range(2))

    assert len(one) == len(other) == 8
    assert one[:5] == other[:5]
    assert not set(one[5:]) & set(other[5:])
    assert one[0] == one[1] != one[2]
    assert EOS_TOKEN_ID not in one


def test_a_part_of_another_length_is_another_part() -> None:
    factory = Prompts(BLOCK_SIZE)

    short = factory.make(call(prompt=8, prefix=(part("a", 4),))).token_ids
    long = factory.make(call(prompt=8, prefix=(part("a", 5),))).token_ids

    assert short[0] != long[0]


def test_block_names_do_not_depend_on_the_calls_before() -> None:
    shared = call(prompt=8, prefix=(part("a", 8),))
    fresh, used = Prompts(BLOCK_SIZE), Prompts(BLOCK_SIZE)
    used.make(call(prompt=20, prefix=(part("z", 20),)))

    names = [
        vllm_request(p.token_ids, p.hash_blocks).block_hashes
        for p in (fresh.make(shared), used.make(shared))
    ]

    assert names[0] == names[1]
