"""Least squares with coefficients from 0, for a handful of unknowns; standard library only."""

from __future__ import annotations

from collections.abc import Sequence

_NEGLIGIBLE = 1e-12


def solve_nonnegative(gram: Sequence[Sequence[float]], moment: Sequence[float]) -> list[float]:
    """Return x >= 0 that minimises x'Gx/2 - m'x.

    The active-set method of Lawson and Hanson (1974, chapter 23) on the normal equations,
    which are as good as the rows themselves for a few well-scaled columns and a ridge.

    Args:
        gram: Shape (n, n), symmetric, positive definite.
        moment: Shape (n,).
    """
    size = len(moment)
    x = [0.0] * size
    free: list[int] = []
    tolerance = _NEGLIGIBLE * max(1.0, *(abs(m) for m in moment))
    for _ in range(10 * size):
        gains = {
            j: moment[j] - sum(gram[j][k] * x[k] for k in range(size))
            for j in range(size)
            if j not in free
        }
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] <= tolerance:
            break
        free.append(best)
        _descend(gram, moment, x, free)
    return x


def _descend(
    gram: Sequence[Sequence[float]], moment: Sequence[float], x: list[float], free: list[int]
) -> None:
    """Move `x` to the minimum over the free unknowns; fix those that would turn negative."""
    while free:
        wanted = _solve([[gram[i][j] for j in free] for i in free], [moment[i] for i in free])
        if min(wanted) > 0.0:
            for i, value in zip(free, wanted):
                x[i] = value
            return
        shares = {
            i: x[i] / (x[i] - w) if x[i] > 0.0 else 0.0 for i, w in zip(free, wanted) if w <= 0.0
        }
        blocking = min(shares, key=shares.__getitem__)
        for i, value in zip(free, wanted):
            x[i] = max(0.0, x[i] + shares[blocking] * (value - x[i]))
        x[blocking] = 0.0
        free.remove(blocking)


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a positive definite system by elimination; both arguments are consumed."""
    size = len(right)
    for i in range(size):
        pivot = max(matrix[i][i], _NEGLIGIBLE)
        for j in range(i + 1, size):
            factor = matrix[j][i] / pivot
            if factor:
                for k in range(i, size):
                    matrix[j][k] -= factor * matrix[i][k]
                right[j] -= factor * right[i]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(matrix[i][k] * solution[k] for k in range(i + 1, size))
        solution[i] = (right[i] - known) / max(matrix[i][i], _NEGLIGIBLE)
    return solution
