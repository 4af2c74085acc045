"""Who calls, and for which tenant: decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_workflow.router.access_config import ANY_TENANT, AuthConfig
from vllm_workflow.router.credentials import KeyHash, key_id
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.headers import Headers
from vllm_workflow.router.wire import RunInfo, claimed_tenants

_MAX_KEY_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Caller:
    """What a client's key says of it."""

    tenant_id: str
    acts_for: frozenset[str]
    models: frozenset[str]
    """Empty for all."""

    def may_act_for(self, tenant_id: str) -> bool:
        return tenant_id == self.tenant_id or not self.acts_for.isdisjoint({tenant_id, ANY_TENANT})

    def may_ask_for(self, model: str) -> bool:
        return not self.models or model in self.models


class Access:
    """Recognizes callers by their keys. Without a configuration everybody may do everything."""

    def __init__(self, config: AuthConfig | None = None) -> None:
        self.replace(config)

    @property
    def is_open(self) -> bool:
        """Whether calls need no key."""
        return self._config is None

    def replace(self, config: AuthConfig | None) -> None:
        """Take other keys from the next call on; calls under way go on."""
        by_id: dict[str, tuple[KeyHash, Caller]] = {}
        others: list[tuple[KeyHash, Caller]] = []
        for key in config.keys if config else ():
            hashed = key.hashed
            caller = Caller(key.tenant, frozenset(key.acts_for), frozenset(key.models))
            if hashed.key_id:
                by_id[hashed.key_id] = hashed, caller
            else:
                others.append((hashed, caller))
        self._config, self._by_id, self._others = config, by_id, others

    def caller(self, authorization: str) -> Caller | None:
        """Return who calls, by the header `Authorization`; None if nobody needs a key.

        Raises:
            RequestError: 401: no key, or none that is known.
        """
        if self._config is None:
            return None
        key = bearer(authorization)
        number = key_id(key)
        entries = [self._by_id[number]] if number in self._by_id else self._others
        for hashed, caller in entries:
            if hashed.matches(key):
                return caller
        raise unauthorized("the API key is not known here")

    def metrics_need_key(self) -> bool:
        return self._config is not None and not self._config.open_metrics


class KeyCheck:
    """Lets those pass who have one certain key."""

    def __init__(self, key: KeyHash) -> None:
        self.key = key
        """May be replaced."""

    def check(self, headers: Mapping[str, str]) -> None:
        """Do nothing if the key is right.

        Raises:
            RequestError: 401.
        """
        if not self.key.matches(bearer(headers.get("Authorization", ""))):
            raise unauthorized("the operators' key is another one")


def bearer(authorization: str) -> str:
    """Return the key in the header `Authorization`.

    Raises:
        RequestError: 401: there is none.
    """
    kind, _, key = authorization.partition(" ")
    key = key.strip()
    if kind.lower() != "bearer" or not 0 < len(key) <= _MAX_KEY_LENGTH:
        raise unauthorized("expected header Authorization: Bearer API_KEY, got none of that form")
    return key


def unauthorized(message: str) -> RequestError:
    """401: nothing of what was sent is repeated."""
    return RequestError(
        message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )


def admitted(
    caller: Caller | None,
    info: RunInfo,
    headers: Headers,
    body: Mapping[str, Any],
    model: str,
) -> RunInfo:
    """Return what a request says of its run, with the tenant that it counts for.

    Args:
        caller: As its key says; None where no key is needed: then the request is believed.
        info: As the request says.
        headers: Of the request.
        body: Of the request.
        model: Asked for; empty for the only one.

    Raises:
        RequestError: 403: it names a tenant, or asks for a model, that its key does not open.
    """
    if caller is None:
        return info
    for where, claimed in claimed_tenants(headers, body):
        if not caller.may_act_for(claimed):
            raise RequestError(
                f"{where}: expected tenant {caller.tenant_id!r} of the API key, "
                f"got {claimed!a:.80}",
                status=403,
                param=where.split()[-1],
                code="tenant_not_allowed",
            )
    if not caller.may_ask_for(model):
        raise RequestError(
            f"model: expected one of {sorted(caller.models)} with this API key, got {model!a:.80}",
            status=403,
            param="model",
            code="model_not_allowed",
        )
    return info if info.tenant_id else info._replace(tenant_id=caller.tenant_id)


def visible(caller: Caller | None, cards: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the models that a caller may ask for."""
    return [card for card in cards if caller is None or caller.may_ask_for(card["id"])]
