"""`policy.json`: what a tuner writes is what the router and the engine read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_workflow.core.errors import ConfigError, because
from vllm_workflow.core.ordering import (
    DEFAULT_PATIENCE_S,
    DEFAULT_STARVATION_RATIO,
    ORDERING_POLICIES,
    OrderingPolicy,
)

DISPATCH_POLICIES = (
    "hexgen",
    "least-outstanding",
    "power-of-two",
    "predicted-finish",
    "round-robin",
)
"""Names of the dispatch policies; `dispatch.build` makes them."""
ADMISSIONS = ("accept", "reject")
"""What becomes of a run that cannot begin in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Everything that a decision depends on beside predictions, and nothing else."""

    dispatch: str = "predicted-finish"
    """Router: which instance runs a call."""
    alpha: float = 0.3
    """`hexgen` only: 0 looks at queued work alone, 1 at speed alone."""
    seed: int = 0
    """`power-of-two` only: another seed draws other pairs of instances."""
    ordering: str = "slack"
    """Engine and router queue: which waiting call runs first."""
    late_binding: bool = False
    """Router: a call waits there, in the order of the policy, until an instance has a seat and
    KV blocks for it. Not with `round-robin`, which takes each instance in turn."""
    relegate: bool = False
    """Needs `late_binding`: a run begins only if it can be on time beside those under way, see
    `core.admission`; what can no longer be on time waits for all that can."""
    relegation_margin: float = 0.25
    """With `relegate`: kept in reserve, as a share of how much slower runs are predicted to
    get by running beside each other, >= 0."""
    relegated_share: float = 0.05
    """With `relegate`: share of beginnings and of calls that go to runs that cannot be on time,
    whatever waits, so that none starves, above 0, at most 1."""
    max_hold_share: float = 0.2
    """With `relegate`: share of its SLO that a run waits to begin before runs that came later go
    first, from 0 to 1."""
    admission: str = "accept"
    """`accept` takes every run, however late it will be; `reject`, which needs `relegate`, refuses
    a run at its first call if it would wait for longer than `max_hold_share`."""
    risk_quantile: float = 0.0
    """What is left of a run is taken to be what this share of earlier runs did not exceed, below 1;
    0 takes their mean."""
    patience_s: float = DEFAULT_PATIENCE_S
    """Budget that a call without a deadline is ranked by, and duration of one of unknown
    length, > 0."""
    starvation_ratio: float = DEFAULT_STARVATION_RATIO
    """`plas`, `atlas`: a call lets newer runs pass for so many times what its run has attained,
    >= 0; 0 is `fcfs`, a large one is least attained service first, whoever starves."""
    preempt: bool = True
    """Engine: let an urgent waiting call take the seat or KV blocks of a slack-rich one."""
    urgent_slack_s: float = 5.0
    """Engine: a waiting call is urgent when its slack is below this, >= 0."""
    preempt_margin_s: float = 2.0
    """Engine: a victim has at least this much more slack than the urgent call, > 0."""
    preempt_cooldown_s: float = 1.0
    """Engine: a preempted call is not preempted again for this long, >= 0."""
    preempt_waste_s: float = 10.0
    """Engine: seconds of computing again that preemptions may cause to one run, >= 0."""
    late_patience_s: float = 120.0
    """Engine, `slack` only: a waiting call that can no longer be on time is ranked as if its
    deadline were so much later, >= 0; 0 leaves it in front."""
    prefill_chunk_cap: int = 0
    """Engine: tokens per step of a slack-rich prefill while an urgent call is there; 0 is off. It
    evens out decoding, and costs runs their deadlines: see docs/policies/engine.md."""

    def __post_init__(self) -> None:
        _require(
            self.dispatch in DISPATCH_POLICIES, "dispatch", f"one of {DISPATCH_POLICIES}", self
        )
        _require(
            self.ordering in ORDERING_POLICIES,
            "ordering",
            f"one of {tuple(sorted(ORDERING_POLICIES))}",
            self,
        )
        _require(0.0 <= self.alpha <= 1.0, "alpha", "a number from 0 to 1", self)
        quantile_is_usable = 0.0 <= self.risk_quantile < 1.0
        _require(quantile_is_usable, "risk_quantile", "a number from 0 to below 1", self)
        for name in ("patience_s", "preempt_margin_s"):
            value = getattr(self, name)
            _require(0.0 < value < math.inf, name, "a positive, finite number of seconds", self)
        ratio_is_usable = 0.0 <= self.starvation_ratio <= 1e6
        _require(ratio_is_usable, "starvation_ratio", "a number from 0 to 1e6", self)
        for name in (
            "urgent_slack_s",
            "preempt_cooldown_s",
            "preempt_waste_s",
            "late_patience_s",
        ):
            value = getattr(self, name)
            _require(0.0 <= value < math.inf, name, "a finite number of seconds from 0", self)
        _require(
            0.0 <= self.relegation_margin < math.inf,
            "relegation_margin",
            "a finite number from 0",
            self,
        )
        _require(
            0.0 < self.relegated_share <= 1.0,
            "relegated_share",
            "a number above 0, at most 1",
            self,
        )
        _require(self.admission in ADMISSIONS, "admission", f"one of {ADMISSIONS}", self)
        _require(0.0 <= self.max_hold_share <= 1.0, "max_hold_share", "a number from 0 to 1", self)
        _require(self.seed >= 0, "seed", "an integer from 0", self)
        _require(self.prefill_chunk_cap >= 0, "prefill_chunk_cap", "an integer from 0", self)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse what would be without effect beside what it stands with."""
        if self.late_binding and self.dispatch == "round-robin":
            raise ConfigError(
                "late_binding: expected false with dispatch: round-robin, which takes each "
                "instance in turn and so cannot wait for one with room, got True"
            )
        if self.relegate and not self.late_binding:
            raise ConfigError(
                f"relegate: expected late_binding: true beside it, got late_binding: false; {_BASE}"
            )
        if self.admission == "reject" and not self.relegate:
            raise ConfigError(
                "admission: reject expected relegate: true and late_binding: true beside it, "
                f"got relegate: false; {_BASE}"
            )

    @classmethod
    def from_mapping(cls, data: object, *, source: str) -> PolicyConfig:
        """Build from what JSON or YAML gave.

        Args:
            data: A mapping of field names to values, or a name as `from_name` takes it. Fields
                that are not there are as in the class, which is the preset `predicted-finish`,
                or as in the policy that `preset` names.
            source: File and field that `data` came from, for error texts.

        Raises:
            ConfigError: Unknown name or field, wrong type or value out of range.
        """
        if isinstance(data, str):
            return cls.from_name(data, source=source)
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: expected a mapping of fields, got {data!r}")
        known = {f.name: type(f.default) for f in fields(cls)}
        base, values = cls(), dict[str, Any]()
        for name, value in data.items():
            if name == "preset":
                base = cls.from_name(_typed(value, str, f"{source}: preset"), source=source)
            elif name not in known:
                raise ConfigError(
                    f"{source}: unknown field {name!r}; known fields are "
                    f"{sorted([*known, 'preset'])}"
                )
            else:
                values[name] = _typed(value, known[name], f"{source}: {name}")
        try:
            return replace(base, **values)
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from None

    @classmethod
    def from_name(cls, name: str, *, source: str) -> PolicyConfig:
        """Return a preset, or what `DISPATCH+ORDERING` names, e.g. `hexgen+urgency`.

        Taking seats is part of the order by slack and of no other one: a combination preempts
        if it ends in `+slack`, else it is as published.

        Raises:
            ConfigError: Unknown name.
        """
        if name in PRESETS:
            return PRESETS[name]
        dispatch, ordering, options = _combination(name, source)
        try:
            return cls(
                dispatch=dispatch,
                ordering=ordering,
                preempt=ordering == "slack",
                late_binding="late" in options,
                relegate="relegate" in options,
            )
        except ConfigError as e:
            raise ConfigError(f"{source}: policy {name!r}: {e}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> PolicyConfig:
        """Read a `policy.json`.

        Raises:
            ConfigError: The file cannot be read, is not JSON, or does not fit.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise ConfigError(f"{path}: cannot read policy: {because(e)}") from None
        return cls.from_mapping(data, source=str(path))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that name these values in logs, metrics and result files."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def build_ordering(self) -> OrderingPolicy:
        return ORDERING_POLICIES[self.ordering](self.patience_s, self.starvation_ratio)


_BASE = (
    "fields that are not given are as in the preset predicted-finish, "
    "with `preset: workflow` as in the default"
)


def _require(holds: bool, field: str, wanted: str, config: PolicyConfig) -> None:
    if not holds:
        raise ConfigError(f"{field}: expected {wanted}, got {getattr(config, field)!r}")


_KINDS: Mapping[type, str] = {
    bool: "true or false",
    float: "a number",
    int: "an integer",
    str: "a name",
}


def _typed(value: object, wanted: type, where: str) -> Any:
    """Accept an int where a float is wanted; a bool is neither."""
    if wanted is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where}: expected {_KINDS[wanted]}, got {value!r}")
    return value


PRESETS: Mapping[str, PolicyConfig] = MappingProxyType(
    {
        "workflow": PolicyConfig(late_binding=True, relegate=True),
        "predicted-finish": PolicyConfig(),
        "hexgen": PolicyConfig(dispatch="hexgen", ordering="urgency", preempt=False),
        "least-outstanding": PolicyConfig(
            dispatch="least-outstanding", ordering="fcfs", preempt=False
        ),
        "power-of-two": PolicyConfig(dispatch="power-of-two", ordering="fcfs", preempt=False),
        "round-robin": PolicyConfig(dispatch="round-robin", ordering="fcfs", preempt=False),
    }
)
"""Whole policies by one name, as `policy: NAME` in `router.yaml`."""
DEFAULT_POLICY = "workflow"
"""The preset that a router runs unless told otherwise."""


def _combination(name: str, source: str) -> tuple[str, str, list[str]]:
    """Return dispatch, ordering and options that a name is made of.

    Raises:
        ConfigError: It is made of something else.
    """
    dispatch, plus, rest = name.partition("+")
    ordering, *options = rest.split("+")
    if not plus:
        raise ConfigError(
            f"{source}: unknown policy {name!r}; known are {sorted(PRESETS)}, and "
            f"DISPATCH+ORDERING, e.g. 'hexgen+urgency', each but of round-robin with +late or "
            f"+late+relegate too; `vllm-workflow policies` lists them"
        )
    if dispatch not in DISPATCH_POLICIES and dispatch in PRESETS:
        raise ConfigError(
            f"{source}: policy {name!r}: expected nothing after the preset {dispatch!r}, or "
            f"DISPATCH+ORDERING in its place, e.g. 'predicted-finish+slack+late'"
        )
    if ordering in {"late", "relegate"}:
        raise ConfigError(
            f"{source}: policy {name!r}: expected an ordering before +late, "
            f"e.g. 'predicted-finish+slack+late', got none"
        )
    for half, value, known_names in (
        ("dispatch", dispatch, DISPATCH_POLICIES),
        ("ordering", ordering, sorted(ORDERING_POLICIES)),
    ):
        if value not in known_names:
            raise ConfigError(
                f"{source}: policy {name!r}: unknown {half} {value!r}; "
                f"known are {list(known_names)}"
            )
    if options not in ([], ["late"], ["late", "relegate"]):
        raise ConfigError(
            f"{source}: policy {name!r}: expected nothing, +late or +late+relegate after "
            f"{dispatch}+{ordering}, got {'+'.join(options)!r}"
        )
    return dispatch, ordering, options
