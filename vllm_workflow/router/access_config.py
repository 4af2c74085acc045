"""Who may call: the `auth`, `admin` and `tls` of `router.yaml`."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from vllm_workflow.router.credentials import KeyHash, read_key
from vllm_workflow.router.tls import UpstreamTls, digest_of, server_context, upstream_tls
from vllm_workflow.yaml_config import Name, Strict

ANY_TENANT = "*"
_SOURCES = ("key_hash", "key_env", "key_file")


@dataclass(frozen=True, slots=True)
class _Key:
    """What was read; salts differ each time, so files are what tells one from another."""

    file: bytes
    hashed: KeyHash = field(compare=False)


class KeySource(Strict):
    """Where the router learns a key from; one of three."""

    key_hash: str = ""
    """As `vllm-workflow key new` prints it; the key itself is kept by its owner alone."""
    key_env: str = ""
    """Name of an environment variable that holds the key."""
    key_file: str = ""
    """File that holds the key and nothing else."""
    _key: _Key | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _not_in_plain_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and "key" in data:
            raise ValueError(
                "key: expected no key in plain text; give `key_hash` (`vllm-workflow key new` "
                "prints one), `key_env` or `key_file`"
            )
        return data

    @field_validator("key_hash")
    @classmethod
    def _is_hash(cls, text: str) -> str:
        if text:
            KeyHash.parse(text)
        return text

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in _SOURCES if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(_SOURCES)}, got {given or 'none'}")
        if self.key_hash:
            hashed = KeyHash.parse(self.key_hash)
        else:
            hashed = KeyHash.of(read_key(self.key_env, self.key_file))
        self._key = _Key(digest_of(self.key_file), hashed)
        return self

    @property
    def hashed(self) -> KeyHash:
        """The key as a hash, as it was when the configuration was checked."""
        assert self._key is not None
        return self._key.hashed


class KeyConfig(KeySource):
    """A client's key, and what it opens."""

    tenant: Name
    """Whose calls are made with it."""
    acts_for: list[Name] = Field(default_factory=list)
    """Other tenants that calls may name, for a gateway; `*` for any."""
    models: list[Name] = Field(default_factory=list)
    """Models it may ask for; empty for all."""
    name: str = ""
    """For people."""


class AuthConfig(Strict):
    """The keys of clients; without this section everybody may call."""

    keys: Annotated[list[KeyConfig], Field(min_length=1)]
    open_metrics: bool = False
    """Answer /metrics on the clients' port without a key; it names tenants and instances."""

    @model_validator(mode="after")
    def _unique(self) -> AuthConfig:
        ids = [key.hashed.key_id for key in self.keys]
        if twice := {i for i in ids if i and ids.count(i) > 1}:
            raise ValueError(f"keys: declared twice: {sorted(twice)}")
        return self


class AdminConfig(KeySource):
    """The port for operators; without this section there is none."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8081
    """0 takes a free one."""


class TlsConfig(Strict):
    """TLS towards clients, on the port for operators too."""

    cert_file: str
    """PEM, with intermediate certificates."""
    key_file: str
    client_ca_file: str = ""
    """If given, clients must show a certificate that one of these has signed."""

    _digest: bytes = PrivateAttr(default=b"")
    """Of what the files hold, so that a section is another one where that is."""
    _clients: bytes = PrivateAttr(default=b"")
    """The same of `client_ca_file`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._clients = digest_of(self.client_ca_file)
        self._digest = digest_of(self.cert_file, self.key_file)
        self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """Return what connections are taken with.

        Raises:
            ConfigError: A file cannot be used.
        """
        return server_context(self.cert_file, self.key_file, self.client_ca_file)

    def trusts_as(self, other: TlsConfig) -> bool:
        """Whether another section lets the same clients in."""
        return self._clients == other._clients


class UpstreamTlsConfig(Strict):
    """TLS towards one instance, if its url begins with https."""

    verify: bool = True
    """False takes any certificate: anybody between could read and change calls."""
    ca_file: str = ""
    """Who may have signed the instance's certificate, instead of the system's list."""
    cert_file: str = ""
    """What the router shows of itself, where the instance asks for it."""
    key_file: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("expected cert_file and key_file together, got one of them")
        if self.model_fields_set:
            self.loaded()
        return self

    def loaded(self) -> UpstreamTls:
        """Return what connections are made with.

        Raises:
            ConfigError: A file cannot be used.
        """
        return upstream_tls(
            verify=self.verify,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
        )
