"""What is added to a body, and that nothing else changes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.router.body import parse, with_additions
from vllm_workflow.router.errors import RequestError

XARGS: dict[str, str | int] = {"wf_id": "w", "wf_budget_ms": 5}
ADDED = b'"vllm_xargs":{"wf_id":"w","wf_budget_ms":5}'


def added(
    raw: bytes, xargs: dict[str, str | int] | None = None, priority: int | None = None
) -> bytes:
    return with_additions(parse(raw), XARGS if xargs is None else xargs, priority=priority)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"{}", b"{" + ADDED + b"}"),
        (b'{"model": "m"}', b'{"model": "m",' + ADDED + b"}"),
        (b' {"a": 1.0, "b":1e400 } \n', b' {"a": 1.0, "b":1e400 ,' + ADDED + b"} \n"),
        (b'{"a":1,"a":2,"n":1e400}', b'{"a":1,"a":2,"n":1e400,' + ADDED + b"}"),
        (b'{"t":"\\ud800 }\xc3\xa9"}', b'{"t":"\\ud800 }\xc3\xa9",' + ADDED + b"}"),
        (b'{"vllm_xargs": null}', b'{"vllm_xargs": ' + ADDED.partition(b":")[2] + b"}"),
        (
            b'{"vllm_xargs" : { "k" : 1.0 , "wf_id":"old","wf_x":[{}], "big": 1e400 },"z": 1}',
            b'{"vllm_xargs" : {"k" : 1.0,"big": 1e400,"wf_id":"w","wf_budget_ms":5},"z": 1}',
        ),
        (
            b'{"vllm_xargs":{"a":1},"vllm_xargs":{"b":2}}',
            b'{"vllm_xargs":{"a":1},"vllm_xargs":{"b":2,"wf_id":"w","wf_budget_ms":5}}',
        ),
        (
            b'{"x":{"vllm_xargs":{"a":1}}}',
            b'{"x":{"vllm_xargs":{"a":1}},' + ADDED + b"}",
        ),
        (b'{"vllm_xargs": [1]}', b'{"vllm_xargs": [1]}'),
        (b'{"vllm_xargs": "x"}', b'{"vllm_xargs": "x"}'),
    ],
)
def test_values_are_added_where_they_belong(before: bytes, after: bytes) -> None:
    assert added(before) == after


@pytest.mark.parametrize("raw", [b"{}", b'{"vllm_xargs":{"wf_id":"k"}}', b'{"vllm_xargs":null}'])
def test_nothing_to_add_changes_nothing(raw: bytes) -> None:
    assert added(raw, {}) == raw


def test_a_nested_agentic_context_is_flattened_even_in_an_ordinary_call() -> None:
    raw = (
        b'{"vllm_xargs":{"k":1,"agentic_context":{"program_id":"p","step_id":3,"deadline":1.50,'
        b'"nothing":null,"tree":{"a":1},"list":[1]}}}'
    )
    flat = (
        b'{"vllm_xargs":{"k":1,"agentic_program_id":"p","agentic_step_id":3,'
        b'"agentic_deadline":1.50}}'
    )

    assert added(raw, {}) == flat


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b"{}", b'{"priority":7}'),
        (b'{"model":"m"}', b'{"model":"m","priority":7}'),
        (b'{"priority":1}', b'{"priority":1}'),
        (b'{"priority":null}', b'{"priority":null}'),
    ],
)
def test_a_priority_is_added_where_the_client_set_none(raw: bytes, after: bytes) -> None:
    assert added(raw, {}, priority=7) == after


names = st.text() | st.sampled_from(["vllm_xargs", "wf_id", "wf_other", "priority", "model"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(names.filter(lambda n: n != "model"), values, max_size=6)
formats = st.sampled_from([None, 0, 3])


@given(body=bodies, ascii_only=st.booleans(), indent=formats, priority=st.none() | st.integers())
def test_only_what_is_added_differs(
    body: dict[str, Any], ascii_only: bool, indent: int | None, priority: int | None
) -> None:
    text = json.dumps(body, ensure_ascii=ascii_only, indent=indent)
    try:
        raw = text.encode()
    except UnicodeEncodeError:  # a lone surrogate can travel escaped only
        raw = json.dumps(body, indent=indent).encode()

    after = json.loads(added(raw, priority=priority))

    theirs = body.get("vllm_xargs", {})
    expected = dict(body)
    if theirs is None or isinstance(theirs, dict):
        kept = {k: v for k, v in (theirs or {}).items() if not k.startswith("wf_")}
        if isinstance(kept.get("agentic_context"), dict):
            return
        expected["vllm_xargs"] = kept | XARGS
    if priority is not None:
        expected.setdefault("priority", priority)
    assert after == expected


@given(body=bodies, indent=formats)
def test_bytes_outside_the_addition_stay(body: dict[str, Any], indent: int | None) -> None:
    body.pop("vllm_xargs", None)
    raw = json.dumps(body, indent=indent).encode()

    after = added(raw)

    assert after.replace(b"," + ADDED if body else ADDED, b"") == raw


def test_what_matters_is_read() -> None:
    body = parse(b'{"model":"a","model":"m","stream":true,"max_tokens":9}')

    assert (body.model, body.stream, body.max_tokens) == ("m", True, 9)
    assert parse(b'{"max_completion_tokens":5,"max_tokens":9}').max_tokens == 5
    assert parse(b'{"max_tokens":1%b}' % (b"0" * 400)).max_tokens == 1 << 53
    for nonsense in (b'"x"', b"-1", b"0", b"true", b"null", b"1.5"):
        assert parse(b'{"max_tokens":' + nonsense + b"}").max_tokens is None
    assert parse(b'{"stream":"yes"}').stream is False


def by_python(raw: bytes) -> object:
    """What Python's own reader makes of a body; None if it is no JSON object."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    try:
        value = json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


FRAGMENTS = st.sampled_from(
    [
        *rb'{ } [ ] , : "a" "model" " \ud83d \ud800 \u00e9 \n \ NaN Infinity null true'.split(),
        *b"1 - 0 .5 0.1 1e400 1e-400 1E5 -0 -0.0 123456789.125 \xc3\xa9 \xff \xed\xa0\x80".split(),
        *(b" ", b"\n", b"\x00", b"\x01", b"\x0b", b"\x7f", b"\xef\xbb\xbf", b"9" * 25, b"9" * 5000),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@given(
    st.lists(FRAGMENTS, max_size=12).map(lambda parts: b"{" + b"".join(parts) + b"}")
    | st.tuples(FRAGMENTS, FRAGMENTS).map(lambda parts: b'{"a":%b%b}' % parts)
    | st.tuples(st.dictionaries(st.text(max_size=4), VALUES), st.booleans()).map(
        lambda each: json.dumps(each[0], ensure_ascii=each[1]).encode()
    )
)
def test_a_body_says_to_the_router_what_it_says_to_python(raw: bytes) -> None:
    members: object = None
    with contextlib.suppress(RequestError):
        members = parse(raw).members
    expected = by_python(raw)
    if isinstance(expected, dict) and not isinstance(expected.get("model", ""), str | None):
        expected = None

    assert repr(members) == repr(expected)
