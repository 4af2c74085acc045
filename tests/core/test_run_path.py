import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_workflow.core import run_path
from vllm_workflow.core.run_path import RunPath


class Client:
    """Makes the calls of one run by name; a call's stage is its name up to a dash."""

    def __init__(self) -> None:
        self.now = 0.0
        self.path = RunPath(0.0)

    def begin(self, *names: str, gap_s: float = 0.0) -> None:
        self.now += gap_s
        for name in names:
            self.path.began(name, name.split("-")[0], self.now)

    def end(self, name: str, alone_s: float, *, took_s: float | None = None) -> None:
        self.now += alone_s if took_s is None else took_s
        self.path.finished(name, end_time=self.now, alone_s=alone_s)

    def call(self, name: str, alone_s: float, gap_s: float = 0.0) -> None:
        self.begin(name, gap_s=gap_s)
        self.end(name, alone_s)


def test_a_chain_leaves_what_follows_with_the_gaps_of_the_client() -> None:
    client = Client()
    client.call("generate", 3.0)
    client.call("revise", 2.0, gap_s=0.5)
    client.call("judge", 1.0)

    assert client.path.rests_s() == [3.5, 1.0, 0.0]


def test_waiting_in_the_router_counts_for_nothing() -> None:
    client = Client()
    client.call("generate", 3.0)
    client.begin("judge")
    client.end("judge", 1.0, took_s=100.0)

    assert client.path.rests_s() == [1.0, 0.0]


def test_what_waits_for_calls_side_by_side_follows_each_of_them() -> None:
    client = Client()
    client.begin("generate-1", "generate-2", "generate-3")
    client.end("generate-2", 1.0)
    client.end("generate-1", 5.0)
    client.end("generate-3", 9.0)
    client.call("judge", 2.0)

    assert client.path.rests_s() == [2.0, 2.0, 2.0, 0.0]


def test_a_branch_that_goes_on_alone_is_not_what_its_siblings_wait_for() -> None:
    client = Client()
    client.begin("generate-1", "generate-2")
    client.end("generate-1", 1.0)
    client.begin("fix-1")
    client.end("generate-2", 1.0)
    client.end("fix-1", 4.0)
    client.call("judge", 2.0)

    # generate-1, generate-2, fix-1, judge
    assert client.path.rests_s() == [6.0, 2.0, 2.0, 0.0]


def test_the_longest_of_several_paths_counts() -> None:
    client = Client()
    client.call("select", 1.0)
    client.begin("generate-1", "generate-2")
    client.end("generate-1", 2.0)
    client.end("generate-2", 7.0, took_s=5.0)
    client.call("judge", 1.0)

    assert client.path.rests_s()[0] == 8.0


def test_a_round_is_counted_along_the_path_not_over_the_run() -> None:
    client = Client()
    client.begin("generate-1", "generate-2")
    client.end("generate-1", 1.0)
    client.end("generate-2", 1.0)
    client.call("revise", 1.0)

    assert client.path.num_before("generate") == 1
    assert client.path.num_before("revise") == 1
    assert [call.num_before for call in client.path.ended] == [0, 0, 0]
    client.call("revise", 1.0)
    assert client.path.ended[-1].num_before == 1


def test_a_call_that_failed_is_as_if_it_had_not_been_made() -> None:
    client = Client()
    client.call("generate", 1.0)
    client.begin("revise")
    client.path.failed("revise")
    client.call("judge", 2.0)

    assert client.path.rests_s() == [2.0, 0.0]
    assert not client.path.in_flight


def test_of_a_run_without_end_what_came_later_counts_by_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_path, "MAX_CALLS_OF_RUN", 2)
    client = Client()
    for _ in range(5):
        client.call("turn", 1.0)

    assert client.path.rests_s() == [4.0, 3.0]


def test_of_calls_that_have_ended_the_way_to_them_is_not_kept() -> None:
    client = Client()
    for number in range(10):
        client.call(f"s{number}", 1.0)

    assert [call.rounds for call in client.path.ended] == [{}] * 10
    assert client.path.num_before("s0") == 1


def test_stages_that_a_client_invents_do_not_fill_the_memory() -> None:
    client = Client()
    for number in range(run_path.MAX_CALLS_OF_RUN + 50):
        client.call(f"s{number}", 1.0)

    assert len(client.path.ended) == run_path.MAX_CALLS_OF_RUN
    assert len(client.path._rounds) == run_path.MAX_STAGES_OF_RUN


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "end", "end", "fail"]), st.floats(0.0, 1e4)),
        max_size=80,
    )
)
def test_no_path_is_longer_than_all_calls_and_gaps_one_after_the_other(
    script: list[tuple[str, float]],
) -> None:
    client, names = Client(), list[str]()
    total_s = 0.0
    for number, (what, seconds) in enumerate(script):
        if what == "begin":
            names.append(f"s-{number}")
            client.begin(names[-1], gap_s=seconds)
            total_s += seconds
        elif names and what == "end":
            client.end(names.pop(int(seconds) % len(names)), seconds)
            total_s += seconds
        elif names:
            client.path.failed(names.pop(0))
    rests_s = client.path.rests_s()

    assert all(0.0 <= rest_s <= total_s + 1e-6 for rest_s in rests_s)
    assert not rests_s or rests_s[-1] == 0.0
