"""Which candidate is chosen."""

from __future__ import annotations

from tests.text2sql.builders import candidate
from vllm_workflow.text2sql.answer import Cluster
from vllm_workflow.text2sql.selection import choose, cluster, contenders


def test_clusters_ignore_row_order_unless_the_statement_orders() -> None:
    found = cluster(
        [
            candidate((1,), (2,), sql="SELECT a FROM t"),
            candidate((2,), (1,), sql="SELECT a FROM t WHERE b"),
            candidate((2,), (1,), sql="SELECT a FROM t ORDER BY a DESC"),
        ]
    )
    assert [group.members for group in found] == [(0, 1), (2,)]


def test_only_the_best_clusters_contend_and_the_largest_if_there_are_many() -> None:
    candidates = [candidate((1,)), candidate(), candidate((2,)), candidate((2,)), candidate((3,))]
    clusters = cluster(candidates)

    assert contenders(clusters, candidates, limit=9) == (0, 2, 3)
    assert contenders(clusters, candidates, limit=2) == (0, 2)


def test_the_choice_prefers_rows_then_tests_then_votes_then_the_first() -> None:
    candidates = [candidate(), candidate((1,)), candidate((2,)), candidate((3,)), candidate((3,))]
    empty, one, two, three = (
        Cluster(members=(0,), num_passed=9),
        Cluster(members=(1,), num_passed=1),
        Cluster(members=(2,), num_passed=1),
        Cluster(members=(3, 4), num_passed=1),
    )

    assert choose([empty, one], candidates) == 1
    assert choose([two, one], candidates) == 2
    assert choose([one, two, three], candidates) == 3
    assert choose([Cluster(members=(1,), num_passed=2), three], candidates) == 1
