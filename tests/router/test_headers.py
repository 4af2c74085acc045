"""Headers: the fast way to read them takes nothing that llhttp would not, and reads the same."""

from __future__ import annotations

import pytest
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, HttpResponseParser
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_workflow.router.headers import HeadError, Headers, read

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\n"
USUAL = (
    *("Host", "Content-Length", "Connection", "User-Agent", "Content-Type", "X-Workflow-Id"),
    *("x-workflow-id", "authorization", "Date", "X-Request-ID"),
)
NAMES = st.sampled_from([*USUAL, "Transfer-Encoding", "Upgrade", "X-A", "", " ", "Host ", "\tX"])
VALUES = st.sampled_from(
    ["a", "", " a ", "1", "+1", "1 1", "close", "Keep-Alive", "upgrade", "chunked", "a\tb", "a: b"]
) | st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=8)
ENDS = st.sampled_from(["\r\n"] * 8 + ["\n", "\r", "\r\n ", "\r\n\t", "\n\r"])
LINES = st.tuples(NAMES, st.sampled_from([":", ": ", " :", ":  ", ""]), VALUES, ENDS)


class Parsed:
    """What llhttp says of a head."""

    def __init__(self, head: bytes) -> None:
        self.fields: list[tuple[str, str]] = []
        self.has_ended = False
        is_answer = head.startswith(b"HTTP")
        parser = HttpResponseParser(self) if is_answer else HttpRequestParser(self)
        self.is_well_formed = True
        try:
            parser.feed_data(head)
        except (HttpParserError, HttpParserUpgrade):
            self.is_well_formed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.decode("latin-1"), value.decode("latin-1").strip(" \t")))

    def on_headers_complete(self) -> None:
        self.has_ended = True


@pytest.mark.parametrize("first", [REQUEST, ANSWER])
@given(st.lists(LINES, max_size=6))
@example([("Host", ": ", "a", "\r\n"), ("Host", ": ", "b", "\r\n")])
@example([("Host", ": ", "a\r", "\n"), ("Date", ": ", "b", "\r\n")])
@example([("Host", ": ", "a\rb\n", "\r\n"), ("Date", ":", "", "\r\n")])
@example([("Content-Length", ":", "1", "\r\n"), ("Connection", ": ", "Close", "\r\n")])
def test_what_is_read_is_what_llhttp_reads(
    first: bytes, lines: list[tuple[str, str, str, str]]
) -> None:
    text = "".join("".join(line) for line in lines)
    data = first + text.encode("latin-1") + b"\r\n\r\n"
    head = data[: data.index(b"\r\n\r\n") + 4]

    headers = read(head)

    parsed = Parsed(head)
    if headers is None:
        return
    if "content-length" in headers and not headers.get("content-length").isdecimal():
        return  # which whoever asks looks at
    assert parsed.is_well_formed, head
    assert parsed.has_ended, head
    assert {name.lower(): value for name, value in parsed.fields} == {
        name.lower(): headers.get(name.lower()) for name, _ in parsed.fields
    }
    assert len(headers) == len(parsed.fields)
    assert headers.items() == Headers.of(parsed.fields).items()
    for name in USUAL:
        assert headers.values(name.lower()) == Headers.of(parsed.fields).values(name.lower())


def test_usual_heads_are_read_without_llhttp() -> None:
    head = REQUEST + b"Host: a:1\r\naccept:*/*\r\nX-Workflow-Slo-Ms:  5 \r\nConnection: close\r\n"

    headers = read(head + b"Content-Length: 2\r\nX-Request-ID: r\r\n\r\n")

    assert headers is not None
    assert headers.is_usual
    assert headers.lines == ["accept:*/*", "X-Workflow-Slo-Ms:  5 ", "X-Request-ID: r"]
    assert headers.get("x-workflow-slo-ms") == "5"
    assert headers.get("content-length") == "2"
    assert headers.get("connection") == "close"


@pytest.mark.parametrize(
    "line",
    [
        *("X-Unknown: a", "Transfer-Encoding: chunked", "Expect: 100-continue", "Host: b"),
        *("Connection: X-Tenant-Id", "Content-Type: a\tb", "Content-Type: é", " Date: a", "Date"),
        *("Date : a", ": a", "DATE: a"),
    ],
)
def test_what_is_not_usual_is_left_to_llhttp(line: str) -> None:
    assert read(REQUEST + f"Host: a\r\n{line}\r\n\r\n".encode()) is None


def test_what_is_for_one_hop_is_not_passed_on() -> None:
    headers = Headers.of(
        [("Connection", "close, X-Hop"), ("X-Hop", "1"), ("TE", "trailers"), ("X-A", "a"), *two()]
    )

    assert headers.items() == [("X-A", "a"), *two()]
    assert headers.get("x-hop") == "1"
    assert headers.has_several("x-b")
    assert headers.values("x-b") == ["1", "2"]
    assert headers.num_given == 6


def two() -> list[tuple[str, str]]:
    return [("X-B", "1"), ("x-b", "2")]


def test_values_are_replaced_added_and_removed() -> None:
    headers = Headers.of(two())
    before = headers.copy()
    headers.set("X-B", "3")
    headers.add("X-C", "c")
    headers.remove("x-c")
    headers.remove("x-never")

    assert headers.items() == [("X-B", "3")]
    assert "x-c" not in headers
    assert before.items() == two()
    assert before.has_several("x-b")


@pytest.mark.parametrize("value", ["a\r\nX-Evil: b", "a\nb", "a\rb", "a\0b"])
def test_no_value_can_end_its_line(value: str) -> None:
    for change in (Headers().set, Headers().add):
        with pytest.raises(HeadError, match="line break"):
            change("X-A", value)
