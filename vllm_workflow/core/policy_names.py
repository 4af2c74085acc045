"""The names of policies: what each means, where it comes from, which go together.

A policy is named by a preset or as `DISPATCH+ORDERING`, e.g. `power-of-two+sjf`. Under the same
name run the router, an engine and a simulation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vllm_workflow.core.config import PRESETS, PolicyConfig

_HEXGEN = "HexGen-Text2SQL, arXiv 2505.05286"
_AUTELLIX = "Autellix, arXiv 2502.13965"


@dataclass(frozen=True, slots=True)
class About:
    """One name in one line."""

    what: str
    source: str = ""
    """Where it was published; empty for what is this package's own or everybody's."""


DISPATCH: Mapping[str, About] = MappingProxyType(
    {
        "hexgen": About("workload-balanced α rule over predicted service and queued work", _HEXGEN),
        "least-outstanding": About("fewest calls in flight"),
        "power-of-two": About(
            "of two instances drawn at random, the one with fewer calls in flight",
            "Mitzenmacher 2001",
        ),
        "predicted-finish": About("earliest predicted finish plus the slowdown caused to others"),
        "round-robin": About("in turn"),
    }
)
"""Every dispatch policy."""

ORDERING: Mapping[str, About] = MappingProxyType(
    {
        "atlas": About("the run with the shortest attained critical path first", _AUTELLIX),
        "deadline": About("earliest deadline of the run first", "Liu and Layland 1973"),
        "fcfs": About("first come, first served, call by call"),
        "plas": About("the run that has had least service first", _AUTELLIX),
        "program-fcfs": About("the run that came first, first", "Continuum, arXiv 2511.02230"),
        "shortest-remaining": About("the run with least predicted work left first", "Schrage 1968"),
        "sjf": About("shortest predicted call first"),
        "slack": About("least slack of the run first, with seat preemption"),
        "urgency": About("most urgent by the call's own share of the run's budget first", _HEXGEN),
    }
)
"""Every ordering policy."""

PRESET: Mapping[str, About] = MappingProxyType(
    {
        "workflow": About("predicted-finish+slack+late+relegate; the default"),
        "predicted-finish": About("predicted-finish+slack"),
        "hexgen": About("hexgen+urgency", _HEXGEN),
        "least-outstanding": About("least-outstanding+fcfs"),
        "power-of-two": About("power-of-two+fcfs"),
        "round-robin": About("round-robin+fcfs"),
    }
)
"""Every preset."""

BASELINES: tuple[str, ...] = (
    "round-robin+fcfs",
    "least-outstanding+fcfs",
    "power-of-two+fcfs",
    "hexgen+urgency",
    "hexgen+fcfs",
    "round-robin+urgency",
    "least-outstanding+plas",
    "least-outstanding+atlas",
    "least-outstanding+program-fcfs",
    "least-outstanding+deadline",
    "least-outstanding+sjf",
)
"""What others do: the systems and rules to compare with, and the ablations of HexGen-Text2SQL."""

SEARCH: Mapping[str, About] = MappingProxyType(
    {
        "hexgen-oracle+urgency": About(
            "hexgen+urgency with the α that turns out best in each setting", _HEXGEN
        ),
        "clairvoyant": About(
            "of several policies that are told true lengths and true work left, the one that "
            "turns out best in each setting"
        ),
    }
)
"""What only a benchmark can run, in hindsight: no router or engine takes these names."""

ALL: tuple[str, ...] = (
    "workflow",
    *BASELINES,
    "power-of-two+sjf",
    "least-outstanding+shortest-remaining",
    "least-outstanding+urgency",
    "least-outstanding+slack",
    *(f"predicted-finish+{ordering}" for ordering in ORDERING),
    *(f"predicted-finish+{ordering}+late" for ordering in ORDERING if ordering != "slack"),
    "predicted-finish+slack+late",
    "least-outstanding+fcfs+late",
)
"""The default, what others do, and each part of the default with other parts. No two are the
same policy."""

OPTION: Mapping[str, About] = MappingProxyType(
    {
        "late": About("calls wait in the router until an instance has room for them"),
        "relegate": About("runs that cannot be on time beside those under way wait"),
    }
)
"""What may follow `DISPATCH+ORDERING`."""


def parse(name: str) -> PolicyConfig:
    """Return the policy of a name.

    Raises:
        ConfigError: No preset and no known `DISPATCH+ORDERING`; says what is known.
    """
    return PolicyConfig.from_name(name, source="policy")


def name_of(policy: PolicyConfig) -> str:
    """Return what a policy is called wherever one is shown.

    That of the preset that it equals, else the long name of its parts. Parameters are not in it:
    two policies of one name may have different fingerprints.
    """
    for name, preset in PRESETS.items():
        if policy == preset:
            return name
    options = "+late" * policy.late_binding + "+relegate" * policy.relegate
    return f"{policy.dispatch}+{policy.ordering}{options}"


def describe(name: str) -> About:
    """Say in one line what a name means.

    Raises:
        ConfigError: As `parse`.
    """
    parse(name)
    if name in PRESETS:
        return PRESET[name]
    dispatch, ordering, *options = name.split("+")
    parts = [DISPATCH[dispatch], ORDERING[ordering], *(OPTION[o] for o in options)]
    sources = dict.fromkeys(part.source for part in parts if part.source)
    return About("; ".join(part.what for part in parts), "; ".join(sources))
