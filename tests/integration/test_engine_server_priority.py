"""`--scheduling-policy priority` keeps its meaning: priority first, slack among equals."""

from tests.integration.test_engine_server import Client, await_requests, client, wf
from tests.integration.vllm_process import VllmServer

__all__ = ["client"]  # the fixture

VLLM_FLAGS = (
    *("--scheduler", "workflow", "--scheduling-policy", "priority"),
    *("--max-num-seqs", "1"),
)


def test_priority_goes_first_and_slack_second(client: Client, vllm_server: VllmServer) -> None:
    with client.seats_taken(1, priority=-5):
        for name, priority, slack_s in (
            ("low-rich", 1, 300),
            ("low-poor", 1, 100),
            ("high-rich", -1, 300),
            ("high-poor", -1, 100),
            ("urgent", 0, 1),
        ):
            metadata = wf(budget_ms=slack_s * 1000)
            client.complete(name, max_tokens=800, priority=priority, vllm_xargs=metadata)
        # The urgent one takes no seat from a request that is more important.
        await_requests(vllm_server, running=1, waiting=5)
    client.close()

    assert client.ended == ["high-poor", "high-rich", "urgent", "low-poor", "low-rich"]
