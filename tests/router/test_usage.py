"""Token counts out of answers that go by in chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.router.usage import Usage

JSON = (
    b'{"choices":[{"message":{"content":"say \\"prompt_tokens\\": 9"}}],"usage":'
    b'{"prompt_tokens": 12,"total_tokens":15,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":8}}}'
)
RESPONSES = (
    b'data: {"usage":{"input_tokens":12,"input_tokens_details":{"cached_tokens":8},'
    b'"output_tokens":3,"output_tokens_details":{"reasoning_tokens":1},"total_tokens":15}}\n\n'
)
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n'
LAST = b'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def counts(*chunks: bytes, stream: bool = True) -> tuple[int | None, int | None, int | None]:
    usage = Usage(stream=stream)
    for chunk in chunks:
        usage.add(chunk)
    return usage.counts()


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([JSON], (12, 8, 3)),
        ([b"x" * 100_000, JSON], (12, 8, 3)),
        ([JSON[:180], JSON[180:]], (12, 8, 3)),
        ([RESPONSES, DONE], (12, 8, 3)),
        ([TOKEN, TOKEN, LAST, DONE], (12, None, 3)),
        ([TOKEN * 9 + LAST, DONE], (12, None, 3)),
        ([LAST, TOKEN, TOKEN, TOKEN, TOKEN], (None, None, 3)),
        ([TOKEN] * 20 + [DONE], (None, None, 19)),
        ([DONE], (None, None, None)),
        ([], (None, None, None)),
        ([b'{"usage": {"completion_tokens": 99999999999999999999}}'], (None, None, None)),
    ],
)
def test_counts_are_found_at_the_end(
    chunks: list[bytes], expected: tuple[int | None, int | None, int | None]
) -> None:
    assert counts(*chunks) == expected


def test_events_are_no_tokens_where_nothing_is_streamed() -> None:
    assert counts(b"a\n\nb\n\nc\n\nd\n\n", stream=False) == (None, None, None)


@given(st.lists(st.binary(), max_size=8), st.booleans())
def test_whatever_an_answer_holds_is_survived(chunks: list[bytes], stream: bool) -> None:
    for count in counts(*chunks, stream=stream):
        assert count is None or count >= 0


@pytest.mark.parametrize(
    ("chunks", "ends"), [([], True), ([TOKEN], True), ([b"x\n", b"\n"], True), ([b"x\n"], False)]
)
def test_an_answer_ends_where_an_event_ends(chunks: list[bytes], ends: bool) -> None:
    usage = Usage(stream=True)
    for chunk in chunks:
        usage.add(chunk)

    assert usage.ends_event is ends
