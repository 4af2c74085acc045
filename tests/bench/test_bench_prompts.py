from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.builders import part, trace_call
from tests.bench.replay_engine import num_shared
from vllm_workflow.bench.prompts import Prompts
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.sim.types import PrefixPart

PARTS = st.lists(st.builds(part, st.sampled_from("abc"), st.integers(1, 30)), max_size=4)


def ids(prompts: Prompts, run_id: str = "r", call_id: str = "c", **fields: object) -> list[int]:
    call = trace_call(call_id, **fields)
    return list(json.loads(b"[" + prompts.json_ids(run_id, call) + b"]"))


@given(parts=PARTS, length=st.integers(1, 200))
def test_a_prompt_has_exactly_the_length_of_the_trace(parts: list[PrefixPart], length: int) -> None:
    prompt = ids(Prompts.of_vocabulary(1000), prefix=tuple(parts), num_prompt_tokens=length)

    assert len(prompt) == length
    assert all(4 <= token < 1000 for token in prompt)


def test_prompts_share_the_tokens_of_their_equal_parts_and_no_more() -> None:
    prompts = Prompts.of_vocabulary(100_000)
    template, schema = part("template", 30), part("schema", 50)
    one = ids(prompts, "r1", prefix=(template, schema), num_prompt_tokens=100)
    sibling = ids(prompts, "r1", "d", prefix=(template, schema), num_prompt_tokens=120)
    other = ids(prompts, "r2", prefix=(template, part("other schema", 50)), num_prompt_tokens=100)
    longer = ids(prompts, "r3", prefix=(part("template", 31),), num_prompt_tokens=100)

    assert num_shared(one, sibling) == 80
    assert num_shared(one, other) == 30
    assert num_shared(one, longer) == 0


def test_the_same_call_of_another_run_has_a_tail_of_its_own() -> None:
    prompts = Prompts.of_vocabulary(100_000)

    assert num_shared(ids(prompts, "r1"), ids(prompts, "r2")) == 0
    assert ids(prompts, "r1") == ids(prompts, "r1")


def test_prompts_of_different_salts_share_nothing() -> None:
    one, other = (Prompts.of_vocabulary(100_000, salt) for salt in "ab")
    parts = (part("template", 30),)

    assert num_shared(ids(one, prefix=parts), ids(other, prefix=parts)) == 0


def test_another_process_makes_the_same_prompts() -> None:
    code = (
        "from tests.bench.test_bench_prompts import *; "
        "print(ids(Prompts.of_vocabulary(5000), prefix=(part('a', 9),)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert json.loads(printed) == ids(Prompts.of_vocabulary(5000), prefix=(part("a", 9),))


def test_a_vocabulary_too_small_to_tell_prompts_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 8 token ids, got 2"):
        Prompts.of_vocabulary(6)
