"""The policies of a comparison by name, with the searches that only hindsight allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from vllm_workflow.bench.compare_jobs import Sample, Variant
from vllm_workflow.bench.peers import GROUP, PEERS
from vllm_workflow.core import policy_names
from vllm_workflow.core.config import PolicyConfig
from vllm_workflow.core.errors import ConfigError
from vllm_workflow.core.metrics import mean, percentile, slo_attainment

ALPHAS = tuple(step / 10 for step in range(11))
"""Grid of `hexgen-oracle+urgency`."""
PORTFOLIO = (
    "predicted-finish+slack",
    "predicted-finish+deadline",
    "predicted-finish+shortest-remaining",
    "predicted-finish+program-fcfs",
    "least-outstanding+slack",
    "least-outstanding+deadline",
    "least-outstanding+shortest-remaining",
)
"""What `clairvoyant` chooses from, each also with late binding."""

Score = tuple[float, ...]
"""Of a variant in one setting; the smallest wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a comparison: a policy, or several of which the best counts."""

    name: str
    variants: tuple[Variant, ...]
    score: Callable[[Sequence[Sample]], Score]
    """Of a variant's samples, one per seed."""


def p95_s(samples: Sequence[Sample]) -> float:
    """Mean over seeds of the P95 of run latency."""
    values = [percentile(sample.latencies_s, 95.0) for sample in samples]
    return mean([value for value in values if value is not None]) or 0.0


def attainment(samples: Sequence[Sample]) -> float:
    """Mean over seeds of the share of runs that met their SLO."""
    values = [slo_attainment(sample.latencies_s, sample.slos_s) for sample in samples]
    return mean([value for value in values if value is not None]) or 0.0


def by_p95(samples: Sequence[Sample]) -> Score:
    return (p95_s(samples),)


def by_attainment(samples: Sequence[Sample]) -> Score:
    """Most attainment first, then least P95."""
    return -attainment(samples), p95_s(samples)


def entries(names: Iterable[str]) -> list[Entry]:
    """Return the policies that names mean, each name once, in order.

    Args:
        names: `all`, `baselines`, a preset, DISPATCH+ORDERING, a search of
            `policy_names.SEARCH`, or a `policy.json`.

    Raises:
        ConfigError: Unknown name; says what is known.
    """
    groups = {"all": policy_names.ALL, "baselines": policy_names.BASELINES}
    expanded = dict.fromkeys(each for name in names for each in groups.get(name, (name,)))
    return [_entry(name) for name in expanded]


def is_baseline(name: str) -> bool:
    """Whether a policy is what others do, hindsight about α included."""
    return name in policy_names.BASELINES or name == "hexgen-oracle+urgency"


def _entry(name: str) -> Entry:
    if name == "hexgen-oracle+urgency":
        config = policy_names.parse("hexgen+urgency")
        grid = tuple(
            Variant(policy=replace(config, alpha=alpha), label=f"α {alpha:g}") for alpha in ALPHAS
        )
        return Entry(name=name, variants=grid, score=by_p95)
    if name == "clairvoyant":
        return Entry(name=name, variants=_portfolio(), score=by_attainment)
    return Entry(name=name, variants=(Variant(policy=_config(name)),), score=by_p95)


def _portfolio() -> tuple[Variant, ...]:
    found = []
    for name in PORTFOLIO:
        config = policy_names.parse(name)
        for late in (False, True):
            label = f"{name}, late binding" if late else name
            policy = replace(config, late_binding=late)
            found.append(Variant(policy=policy, label=label, is_clairvoyant=True))
    return tuple(found)


def _config(name: str) -> PolicyConfig:
    if name.endswith(".json"):
        return PolicyConfig.from_file(name)
    try:
        return policy_names.parse(name)
    except ConfigError as e:
        if name == GROUP or name in PEERS:
            raise ConfigError(
                f"--policies: {name!r}: other routers are for --level 3 only"
            ) from None
        known = ["all", "baselines", *policy_names.SEARCH]
        raise ConfigError(f"--policies: {e}; also known here are {known}") from None
