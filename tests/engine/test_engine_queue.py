from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.engine_builders import ids
from vllm_workflow.engine.queue import MIN_DEAD_ENTRIES, OrderedRequestQueue


def request(request_id: str, rank: float = 0.0) -> Any:
    return SimpleNamespace(request_id=request_id, rank=rank)


def queue_of(*requests: Any, key: Callable[[Any], Any] = lambda r: (r.rank,)) -> Any:
    return OrderedRequestQueue(key, requests)


def drain(queue: Any) -> list[str]:
    return [queue.pop_request().request_id for _ in range(len(queue))]


def test_the_smallest_key_runs_first() -> None:
    assert drain(queue_of(request("c", 3), request("a", 1), request("b", 2))) == ["a", "b", "c"]


def test_equal_keys_run_first_come_first_served() -> None:
    assert drain(queue_of(request("a"), request("b"), request("c"))) == ["a", "b", "c"]


def test_prepending_overtakes_equals_only() -> None:
    queue = queue_of(request("urgent", 1), request("early", 2), request("late", 3))

    queue.prepend_request(request("resumed", 2))

    assert drain(queue) == ["urgent", "resumed", "early", "late"]


def test_prepending_several_reverses_them_as_vllm_does() -> None:
    queue = queue_of(request("c"))

    queue.prepend_requests([request("b"), request("a")])

    assert drain(queue) == ["a", "b", "c"]


def test_the_key_is_frozen_until_the_request_is_ranked_anew() -> None:
    first, second = request("first", 1), request("second", 2)
    queue = queue_of(first, second)
    first.rank = 3

    assert queue.peek_request() is first
    queue.rekey_request(first)
    assert drain(queue) == ["second", "first"]


def test_a_removed_request_does_not_come_up() -> None:
    a, b, c = request("a"), request("b"), request("c")
    queue = queue_of(a, b, c)

    queue.remove_request(a)
    queue.remove_requests([c, request("elsewhere")])

    assert ids(queue) == ["b"]
    assert (len(queue), bool(queue)) == (1, True)


def test_a_removed_request_can_come_back() -> None:
    a, b = request("a"), request("b")
    queue = queue_of(a, b)

    queue.remove_request(a)
    queue.add_request(a)

    assert drain(queue) == ["b", "a"]
    assert not queue


def test_removing_a_stranger_is_an_error_as_in_vllm() -> None:
    with pytest.raises(ValueError, match="'a' is not in the queue"):
        queue_of().remove_request(request("a"))


@pytest.mark.parametrize("method", ["peek_request", "pop_request"])
def test_an_empty_queue_raises_index_error_as_in_vllm(method: str) -> None:
    with pytest.raises(IndexError, match="empty queue"):
        getattr(queue_of(), method)()


def test_it_can_be_subscripted_in_order() -> None:
    queue = queue_of(request("b", 2), request("a", 1))

    assert (queue[0].request_id, queue[-1].request_id) == ("a", "b")


def test_memory_stays_bounded_when_requests_are_removed_forever() -> None:
    queue = queue_of(request("stays"))

    for i in range(10_000):
        gone = request(str(i))
        queue.add_request(gone)
        queue.remove_request(gone)

    assert queue.num_entries <= 2 * len(queue) + MIN_DEAD_ENTRIES


def test_memory_stays_bounded_when_requests_are_ranked_anew_forever() -> None:
    one = request("one")
    queue = queue_of(one)

    for _ in range(10_000):
        queue.rekey_request(one)

    assert queue.num_entries <= 2 * len(queue) + MIN_DEAD_ENTRIES


@given(ranks=st.lists(st.integers(0, 5)), n=st.integers(0, 10), removed=st.sets(st.integers(0, 30)))
def test_first_n_is_the_front_of_the_order(ranks: list[int], n: int, removed: set[int]) -> None:
    requests = [request(str(i), rank) for i, rank in enumerate(ranks)]
    queue = queue_of(*requests)
    queue.remove_requests([r for i, r in enumerate(requests) if i in removed])

    found = queue.first(n)

    assert found == list(queue)[: len(found)]
    assert len(found) == min(n, len(queue)) or removed


@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["add", "prepend", "pop", "remove"]),
            st.integers(0, 9),
            st.integers(0, 3),
        )
    )
)
def test_it_behaves_like_a_sorted_list(operations: list[tuple[str, int, int]]) -> None:
    queue = queue_of()
    model: list[Any] = []
    for name, number, rank in operations:
        here = [r for r in model if r.request_id == str(number)]
        one = here[0] if here else request(str(number), rank)
        if name in ("add", "prepend") and not here:
            getattr(queue, f"{name}_request")(one)
            model.insert(len(model) if name == "add" else 0, one)
            model.sort(key=lambda r: r.rank)
        elif name == "pop" and model:
            assert queue.pop_request() is model.pop(0)
        elif name == "remove" and here:
            queue.remove_request(one)
            model.remove(one)
        assert ids(queue) == ids(model)
        assert len(queue) == len(model)
        if model:
            assert queue.peek_request() is model[0]
