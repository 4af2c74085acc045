"""Who may call: the `auth`, `admin` and `tls` of `router.yaml`."""

from __future__ import annotations

import ssl
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.credentials import KeyHash, read_key
from vllm_workflow.yaml_config import Name, Strict

ANY_TENANT = "*"
_SOURCES = ("key_hash", "key_env", "key_file")


class KeySource(Strict):
    """Where the router learns a key from; one of three."""

    key_hash: str = ""
    """As `vllm-workflow key new` prints it; the key itself is kept by its owner alone."""
    key_env: str = ""
    """Name of an environment variable that holds the key."""
    key_file: str = ""
    """File that holds the key and nothing else."""

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
    def _one_source(self) -> KeySource:
        given = [name for name in _SOURCES if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(_SOURCES)}, got {given or 'none'}")
        self.hashed()
        return self

    def hashed(self) -> KeyHash:
        """Return the key as a hash.

        Raises:
            ConfigError: The variable or file has none.
        """
        if self.key_hash:
            return KeyHash.parse(self.key_hash)
        return KeyHash.of(read_key(self.key_env, self.key_file))


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
        ids = [key.hashed().key_id for key in self.keys]
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

    @model_validator(mode="after")
    def _check(self) -> TlsConfig:
        self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """Return what connections are taken with; `load` renews it.

        Raises:
            ConfigError: A file cannot be used.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.load(context)
        return context

    def load(self, context: ssl.SSLContext) -> None:
        """Make `context` use these files from the next handshake on.

        Raises:
            ConfigError: A file cannot be used.
        """
        _load_chain(context, self.cert_file, self.key_file)
        if self.client_ca_file:
            _load_ca(context, self.client_ca_file, "client_ca_file")
            context.verify_mode = ssl.CERT_REQUIRED


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
    def _check(self) -> UpstreamTlsConfig:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("expected cert_file and key_file together, got one of them")
        if self.model_fields_set:
            self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """Return what connections are made with.

        Raises:
            ConfigError: A file cannot be used.
        """
        context = ssl.create_default_context()
        if self.ca_file:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _load_ca(context, self.ca_file, "ca_file")
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.cert_file:
            _load_chain(context, self.cert_file, self.key_file)
        return context


def _load_chain(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    try:
        # An encrypted key would be asked for on a terminal that nobody sits at.
        context.load_cert_chain(cert_file, key_file, password="")
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"cert_file, key_file: expected a certificate and its key in PEM without a password, "
            f"got {cert_file} and {key_file}: {_reason(e)}"
        ) from None


def _load_ca(context: ssl.SSLContext, file: str, where: str) -> None:
    try:
        context.load_verify_locations(file)
    except OSError as e:
        raise ConfigError(
            f"{where}: expected certificates in PEM, got {file}: {_reason(e)}"
        ) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
