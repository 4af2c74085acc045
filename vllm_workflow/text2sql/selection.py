"""Chooses one of many candidates: clusters by result, weighed by test verdicts and votes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

from vllm_workflow.text2sql.answer import Cluster, UnitTest
from vllm_workflow.text2sql.comparison import result_key
from vllm_workflow.text2sql.types import Execution, SqlCandidate, Status

_STATUS_RANK = {Status.OK: 0, Status.EMPTY: 1}
_FAILED_RANK = 2


def status_rank(execution: Execution) -> int:
    """Smaller is better: rows, then an empty result, then any failure."""
    return _STATUS_RANK.get(execution.status, _FAILED_RANK)


def cluster(candidates: Sequence[SqlCandidate]) -> tuple[Cluster, ...]:
    """Group candidates by the answer they gave, in the order of their first members."""
    members: dict[Hashable, list[int]] = {}
    for index, candidate in enumerate(candidates):
        members.setdefault(result_key(candidate.execution), []).append(index)
    return tuple(Cluster(members=tuple(indices)) for indices in members.values())


def contenders(
    clusters: Sequence[Cluster], candidates: Sequence[SqlCandidate], limit: int
) -> tuple[int, ...]:
    """Return the clusters, ascending, between which tests have to decide.

    A cluster that failed never beats one that gave rows, whatever a test says, so only
    clusters of the best status are tested; the `limit` largest if there are many. A lone
    contender needs no test.
    """
    ranks = [status_rank(candidates[c.members[0]].execution) for c in clusters]
    best = [index for index, rank in enumerate(ranks) if rank == min(ranks)]
    best.sort(key=lambda index: (-len(clusters[index].members), index))
    return tuple(sorted(best[:limit]))


def with_verdicts(clusters: Sequence[Cluster], tests: Sequence[UnitTest]) -> tuple[Cluster, ...]:
    """Return the clusters with the number of tests that each passed."""
    counted = []
    for index, group in enumerate(clusters):
        verdicts = [test.passed[index] for test in tests if test.passed[index] is not None]
        counted.append(replace(group, num_passed=sum(map(bool, verdicts)) if verdicts else None))
    return tuple(counted)


def choose(clusters: Sequence[Cluster], candidates: Sequence[SqlCandidate]) -> int:
    """Return the index of the candidate to answer with.

    Rows before nothing before failure. Then agreement among candidates and tests counts
    together, as in CodeT (arXiv 2207.10397): tests passed times the square root of the number
    of candidates, so that a lone candidate needs clearly more tests than a large cluster. Then
    size of the cluster; then the cluster that came first.
    """

    def rank(index: int) -> tuple[int, float, int, int]:
        group = clusters[index]
        status = status_rank(candidates[group.members[0]].execution)
        agreement = (group.num_passed or 0) * math.sqrt(len(group.members))
        return (status, -agreement, -len(group.members), index)

    return clusters[min(range(len(clusters)), key=rank)].members[0]
