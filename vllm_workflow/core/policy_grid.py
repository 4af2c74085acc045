"""Which policies a tuner tries."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType

from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError

MAX_POINTS = 200

Grid = Mapping[str, Sequence[object]]
"""Field of `PolicyConfig` -> its values; every combination is a point."""

HEXGEN_GRID: Grid = MappingProxyType({"alpha": tuple(step / 20 for step in range(21))})
"""Its one parameter, twice as fine as its authors searched it."""

DEFAULT_GRID: Grid = MappingProxyType(
    {
        "ordering": ("slack", "deadline", "program-fcfs", "shortest-remaining"),
        "late_binding": (True, False),
        "relegate": (False, True),
        "relegation_margin": (0.1, 0.25, 0.5),
    }
)
"""What decides in the router, 20 points: the order of calls, whether they wait there, and
whether runs that can no longer be on time give way. Not in it: `patience_s`, which only calls
without a deadline feel; dispatch rules that know no seconds, which lose wherever they were
compared; and what engines are started with."""


def default_grid(policy: PolicyConfig) -> Grid:
    """Return what is tried when nobody says what."""
    return HEXGEN_GRID if policy.dispatch == "hexgen" else DEFAULT_GRID


def points(policy: PolicyConfig, grid: Grid, *, source: str = "grid") -> tuple[PolicyConfig, ...]:
    """Return the policies of a grid, no two of which decide alike, the present one first.

    Args:
        policy: The present one; fields outside the grid stay as they are.
        grid: At least one field with at least one value.
        source: File and field that it came from, for errors.

    Raises:
        ConfigError: Unknown field, a value or combination that no policy can have, nothing to
            try, or more than `MAX_POINTS`.
    """
    found = {_significant(policy): policy}
    base = asdict(policy)
    for values in itertools.product(*(_values(grid, name, source) for name in grid)):
        fields = base | dict(zip(grid, values))
        if fields["dispatch"] == "round-robin":
            fields["late_binding"] = False  # it cannot wait for any one instance
        if not fields["late_binding"]:
            fields["relegate"] = False
        if fields["admission"] == "reject" and not fields["relegate"]:
            continue  # whoever wants runs refused does not want a policy that refuses none
        point = PolicyConfig.from_mapping(fields, source=source)
        found.setdefault(_significant(point), point)
        if len(found) > MAX_POINTS:
            raise ConfigError(f"{source}: expected at most {MAX_POINTS} points, got more")
    if len(found) == 1:
        raise ConfigError(
            f"{source}: expected a policy that decides otherwise than the present one, got none "
            f"among {dict(grid)!r:.200}"
        )
    return tuple(found.values())


def changes(policy: PolicyConfig, point: PolicyConfig) -> dict[str, object]:
    """Return the fields of `point` that make it another policy, with their values."""
    before = asdict(_significant(policy))
    return {
        name: value for name, value in asdict(_significant(point)).items() if before[name] != value
    }


def _values(grid: Grid, name: str, source: str) -> Iterable[object]:
    values = grid[name]
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ConfigError(f"{source}: {name}: expected a list of values, got {values!r:.80}")
    return values


def _significant(policy: PolicyConfig) -> PolicyConfig:
    """Return the policy with the fields that it does not read as they are by default."""
    unread: list[str] = []
    if policy.dispatch != "hexgen":
        unread.append("alpha")
    if policy.dispatch != "power-of-two":
        unread.append("seed")
    if policy.ordering not in {"plas", "atlas"}:
        unread.append("starvation_ratio")
    if not policy.late_binding:
        unread.append("relegate")
    if not (policy.late_binding and policy.relegate):
        unread += ["relegation_margin", "relegated_share"]
    default = asdict(PolicyConfig())
    return replace(policy, **{name: default[name] for name in unread})
