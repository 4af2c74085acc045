"""What a request says of its run: read here, whatever way it was said.

Sources in order of precedence; the first that names any field of a run is taken whole, and
the others are not read, so that two of them never mix:

1. headers `X-Workflow-*`;
2. `workflow_*` in the body's `metadata`, whose values OpenAI wants to be strings;
3. `wf_*` in the body's `vllm_xargs`;
4. what other routers and agents speak, see `dialects`.

The tenant is not part of a run's identity, a gateway may add it: it is looked for in the
sources one by one. A malformed value of 1 to 3 is an error; one of 4 is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from vllm_workflow.core.handover import XARGS
from vllm_workflow.router.errors import RequestError, malformed
from vllm_workflow.router.headers import Headers

MAX_LABEL_LENGTH = 256
MAX_MS = 1e11
"""About three years; more is a mistake of units, and would not survive arithmetic."""


class RunInfo(NamedTuple):
    """What a request says of its run; every field may be missing."""

    workflow_id: str = ""
    workflow: str = ""
    stage: str = ""
    tenant_id: str = ""
    slo_ms: float | None = None
    """Promise for the whole run, counted from its first call."""
    budget_ms: float | None = None
    """What is left of it now; 0 is already late."""
    attained_ms: float | None = None
    """Service that its calls have had, as far as the client can tell; for a router that knows
    nothing of them, because another one had them."""
    final: bool = False
    priority: int | None = None
    """From another dialect, in vLLM's polarity: lower runs first."""
    expected_output_tokens: float | None = None

    @property
    def names_run(self) -> bool:
        """Whether there is anything to tell an engine; an ordinary call is forwarded as it is."""
        return bool(
            self.workflow_id
            or self.workflow
            or self.stage
            or self.slo_ms is not None
            or self.budget_ms is not None
            or self.final
        )


def is_label(value: str) -> bool:
    """Whether `value` can be a header's value, a log's field and a key of ours as it is."""
    return 0 < len(value) <= MAX_LABEL_LENGTH and value.isascii() and value.isprintable()


def _label(value: object, where: str) -> str:
    if type(value) is int and abs(value) < 1 << 63:
        return str(value)
    if not isinstance(value, str) or not is_label(value):
        raise malformed(where, f"1 to {MAX_LABEL_LENGTH} printable ASCII characters", value)
    return value


@lru_cache(maxsize=1024)
def _known(value: str, where: str) -> str:
    return _label(value, where)


def _name(value: object, where: str) -> str:
    """As `_label`, of what many calls share; so do those who keep it."""
    return _known(value, where) if type(value) is str else _label(value, where)


def _milliseconds(value: object, where: str) -> float:
    number = math.nan
    if type(value) is int and abs(value) < 1 << 63:
        number = float(value)
    elif isinstance(value, float):
        number = value
    elif isinstance(value, str) and len(value) <= 32 and value.isascii() and "_" not in value:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if not 0.0 <= number <= MAX_MS:
        raise malformed(where, f"a number of milliseconds from 0 to {MAX_MS:.0f}", value)
    return number


def _positive_milliseconds(value: object, where: str) -> float:
    number = _milliseconds(value, where)
    if number == 0.0:
        raise malformed(where, "a number of milliseconds above 0", value)
    return number


_FLAGS: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}


def _flag(value: object, where: str) -> bool:
    if isinstance(value, str | int) and (flag := _FLAGS.get(str(value).lower())) is not None:
        return flag
    raise malformed(where, "true or false", value)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    header: str
    metadata: str
    xarg: str
    read: Callable[[object, str], Any]


_FIELDS = (
    _Field("workflow_id", "X-Workflow-Id", "workflow_id", "wf_id", _label),
    _Field("workflow", "X-Workflow-Name", "workflow_name", "wf_name", _name),
    _Field("stage", "X-Workflow-Stage", "workflow_stage", "wf_stage", _name),
    _Field("slo_ms", "X-Workflow-Slo-Ms", "workflow_slo_ms", "wf_slo_ms", _positive_milliseconds),
    _Field(
        "budget_ms",
        "X-Workflow-Budget-Ms",
        "workflow_budget_ms",
        "wf_budget_ms",
        _milliseconds,
    ),
    _Field(
        "attained_ms",
        "X-Workflow-Attained-Ms",
        "workflow_attained_ms",
        "wf_attained_ms",
        _milliseconds,
    ),
    _Field("final", "X-Workflow-Final", "workflow_final", "wf_final", _flag),
)
_TENANT = _Field("tenant_id", "X-Tenant-Id", "tenant_id", "wf_tenant", _name)
OWN_HEADERS = tuple(field.header for field in (*_FIELDS, _TENANT))
FIELD_NAMES: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = (
    OWN_HEADERS,
    tuple([field.metadata for field in (*_FIELDS, _TENANT)]),
    (*[field.xarg for field in (*_FIELDS, _TENANT)], *XARGS),
)
"""All that is read or written in each source: headers, `metadata`, `vllm_xargs`."""


class _Key(NamedTuple):
    """One of our fields in one of the sources."""

    key: str
    """Of a header in lower case."""
    where: str
    """The same for who has to correct it."""
    name: str
    """Of the field of `RunInfo`."""
    read: Callable[[object, str], Any]


def _keys(attribute: str, prefix: str) -> tuple[_Key, ...]:
    keys = [(getattr(field, attribute), field) for field in (*_FIELDS, _TENANT)]
    is_header = attribute == "header"
    return tuple(
        [
            _Key(key.lower() if is_header else key, prefix + key, field.name, field.read)
            for key, field in keys
        ]
    )


_IN_HEADERS = _keys("header", "header ")
_IN_METADATA = _keys("metadata", "metadata.")
_IN_XARGS = _keys("xarg", "vllm_xargs.")
# What says of a run, and of its tenant.
_RUN_IN_HEADERS, _TENANT_IN_HEADERS = _IN_HEADERS[:-1], _IN_HEADERS[-1:]
_RUN_IN_BODY = (_IN_METADATA[:-1], _IN_XARGS[:-1])
_TENANT_IN_BODY = (_IN_METADATA[-1:], _IN_XARGS[-1:])
_NOTHING: dict[str, Any] = {}


def read_own(headers: Headers, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `RunInfo` that our own three sources give; the first source wins.

    An empty string counts as not given.

    Raises:
        RequestError: A malformed value in the source that counts.
    """
    found: dict[str, Any] = {}
    _read_headers(_RUN_IN_HEADERS, headers, found)
    of_tenant: dict[str, Any] = {}
    _read_headers(_TENANT_IN_HEADERS, headers, of_tenant)
    if not (found and of_tenant):
        for index, source in enumerate(_in_body(body)):
            if source and not found:
                _read(_RUN_IN_BODY[index], source, found)
            if source and not of_tenant:
                _read(_TENANT_IN_BODY[index], source, of_tenant)
    found.update(of_tenant)
    return found


def claimed_tenants(headers: Headers, body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every tenant that a request names: where, and which.

    Not only the one that counts: an engine that is told another one by a source that does not
    count here would believe it.
    """
    found: dict[str, Any] = {}
    _read_headers(_TENANT_IN_HEADERS, headers, found)
    if found:
        yield _TENANT_IN_HEADERS[0].where, found["tenant_id"]
    for keys, source in zip(_TENANT_IN_BODY, _in_body(body)):
        found = {}
        _read(keys, source, found)
        if found:
            yield keys[0].where, found["tenant_id"]


_LOGGED: Mapping[str, str] = {
    "request": "x-request-id",
    "run": "x-workflow-id",
    "workflow": "x-workflow-name",
    "stage": "x-workflow-stage",
    "tenant": "x-tenant-id",
}


def labels_of(headers: Headers) -> dict[str, str]:
    """Return, by the names of a log's fields, what the headers of a refused call say of it.

    Nothing of it has been checked but that it is printable: the call may claim to be anyone's.
    """
    said = {name: headers.get(header) for name, header in _LOGGED.items()}
    return {name: value if is_label(value) else "" for name, value in said.items()}


def _in_body(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Where in a body our fields may stand."""
    return _mapping(body.get("metadata")), _mapping(body.get("vllm_xargs"))


def _read_headers(keys: tuple[_Key, ...], headers: Headers, found: dict[str, Any]) -> None:
    """Add what headers give of some fields.

    Raises:
        RequestError: It is malformed, or one stands there twice: an engine might read the other.
    """
    for key, where, name, read in keys:
        value = headers.get(key)
        if headers.has_several(key):
            number = len(headers.values(key))
            raise RequestError(
                f"{where}: expected one such header, got {number} of them", param=where.split()[-1]
            )
        if value:
            found[name] = read(value, where)


def _read(keys: tuple[_Key, ...], source: Mapping[str, Any], found: dict[str, Any]) -> None:
    """Add what a mapping of the body gives of some fields.

    Raises:
        RequestError: It is malformed.
    """
    for key, where, name, read in keys:
        value = source.get(key)
        if value is not None and value != "":
            found[name] = read(value, where)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else _NOTHING
