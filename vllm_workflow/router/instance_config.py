"""The `instances` of `router.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from ssl import SSLContext
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, field_validator, model_validator

from vllm_workflow.core.fleet import Instance
from vllm_workflow.core.latency import LatencyModel
from vllm_workflow.profiles import catalogue
from vllm_workflow.profiles.profile import LatencyProfile, latency_values
from vllm_workflow.router.access_config import UpstreamTlsConfig
from vllm_workflow.router.credentials import read_key
from vllm_workflow.router.tls import UpstreamTls
from vllm_workflow.yaml_config import Name, Strict

Server = tuple[str, str, int, str]
"""Scheme, host, port and path: what tells one server from others."""
_LATENCY = LatencyModel()
_Count = Annotated[int, Field(ge=1, le=1 << 53)]
"""As far as each is a float, too."""


class LatencyConfig(Strict):
    """Step time of the model on this instance, see `core.latency.LatencyModel`.

    What is left out has the value of the profile, or of the prior from datasheets, if the
    instance names one; else the default here.
    """

    overhead_ms: Annotated[float, Field(ge=0)] = _LATENCY.overhead_s * 1e3
    weights_ms: Annotated[float, Field(ge=0)] = _LATENCY.weights_s * 1e3
    per_token_us: Annotated[float, Field(ge=0)] = _LATENCY.per_token_s * 1e6
    per_token_below_knee_us: Annotated[float, Field(ge=0)] = _LATENCY.per_token_below_knee_s * 1e6
    num_knee_tokens: Annotated[float, Field(ge=0)] | None = _LATENCY.num_knee_tokens
    per_seq_us: Annotated[float, Field(ge=0)] = _LATENCY.per_seq_s * 1e6
    per_kv_token_us: Annotated[float, Field(ge=0)] = _LATENCY.per_kv_token_s * 1e6
    per_prefill_kv_token_us: Annotated[float, Field(ge=0)] = _LATENCY.per_prefill_kv_token_s * 1e6
    max_num_batched_tokens: _Count = _LATENCY.max_num_batched_tokens

    def build(self, base: LatencyModel = _LATENCY) -> LatencyModel:
        """Return `base` with what is set here."""
        values = self.model_dump(include=self.model_fields_set)
        return replace(base, **latency_values(values))


class InstanceConfig(Strict):
    """One vLLM server."""

    url: str
    """Root of the server, e.g. `http://10.0.0.7:8000`."""
    id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] = ""
    """Its name in headers, labels and logs; host and port of the url by default."""
    gpu: str = ""
    """With `model_shape`. Else it is for people only, beside the `latency` or `profile` that counts
    then."""
    model_shape: str = ""
    """With `gpu`: predict `latency` for this shape, e.g. `llama-3.1-8b`, on that GPU."""
    tp: Annotated[int, Field(ge=1)] = 1
    """Tensor-parallel size, for `model_shape`."""
    weight_bits: int = 16
    """Bits of a weight, for `model_shape`: 4, 8 or 16."""
    profile: str = ""
    """File that `vllm-workflow profile` wrote; replaces `model_shape`."""
    models: list[Name] = Field(default_factory=list)
    """Models it serves; asked of the server if empty."""
    max_num_seqs: _Count = 256
    """As the server was started with; vLLM's own default is this, or more on large GPUs."""
    num_kv_tokens: _Count | None = None
    """Tokens that its KV cache holds; by default those of the profile, or as datasheets say."""
    latency: LatencyConfig = LatencyConfig()
    api_key_env: str = ""
    """Environment variable with the key that the server wants (`vllm serve --api-key`)."""
    api_key_file: str = ""
    """File with that key."""
    tls: UpstreamTlsConfig = UpstreamTlsConfig()
    kv_events: str = ""
    """Where the server publishes its KV-cache events, e.g. `tcp://10.0.0.7:5557`; needs the
    `kv-events` extra. Without it, what its prefix cache holds is known from usage alone."""
    _profile: LatencyProfile | None = PrivateAttr(default=None)
    """Files are read when the configuration is checked: one that goes away later changes
    nothing, and where one holds something else the instance is another one."""
    _authorization: str = PrivateAttr(default="")
    _tls: UpstreamTls | None = PrivateAttr(default=None)

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("expected a PORT from 0 to 65535") from None
        if parts.username or parts.password:
            raise ValueError("expected no name and password; give api_key_env or api_key_file")
        if parts.path.rstrip("/").endswith("/v1"):
            raise ValueError("expected the root of the server, without /v1")
        return url.rstrip("/")

    @field_validator("kv_events")
    @classmethod
    def _endpoint(cls, endpoint: str) -> str:
        if not endpoint:
            return endpoint
        parts = urlsplit(endpoint)
        if parts.scheme != "tcp" or not parts.hostname or parts.port is None or parts.path:
            raise ValueError("expected tcp://HOST:PORT")
        if parts.hostname == "*" or parts.username is not None or parts.query or parts.fragment:
            raise ValueError("expected tcp://HOST:PORT that can be connected to")
        missing = [name for name in ("zmq", "msgspec") if find_spec(name) is None]
        if missing:
            raise ValueError(f"needs {missing}: pip install 'vllm-workflow[kv-events]'")
        return endpoint

    @model_validator(mode="before")
    @classmethod
    def _default_id(cls, data: Any) -> Any:
        if isinstance(data, dict) and "id" not in data and isinstance(data.get("url"), str):
            # A url without a host is an error of its own, and one is enough.
            return {**data, "id": urlsplit(data["url"]).netloc.rpartition("@")[2] or "none"}
        return data

    @property
    def server(self) -> Server:
        """What tells its server from others, however its url is written."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return parts.scheme, parts.hostname or "", port, parts.path.rstrip("/")

    @property
    def authorization(self) -> str:
        """The header's value for this server; empty if it wants no key."""
        return self._authorization

    @property
    def ssl(self) -> SSLContext | bool:
        """What connections are made with, in aiohttp's words."""
        return True if self._tls is None else self._tls.context

    def build(self, models: Sequence[str] | None = None) -> Instance:
        """Return the core's value, with `models` where the configuration names none.

        Raises:
            ConfigError: The latency cannot be.
        """
        profile = self._profile
        return Instance(
            instance_id=self.id,
            models=tuple(self.models or models or ()),
            latency=self.latency.build(profile.latency) if profile else self.latency.build(),
            max_num_seqs=self.max_num_seqs,
            num_kv_tokens=self.num_kv_tokens or (profile.num_kv_tokens if profile else None),
        )

    def _latency_profile(self) -> LatencyProfile | None:
        if self.profile:
            return LatencyProfile.from_file(Path(self.profile))
        if not self.model_shape:
            return None
        return catalogue.profile(
            self.gpu, self.model_shape, tp=self.tp, weight_bits=self.weight_bits
        )

    @model_validator(mode="after")
    def _check(self) -> InstanceConfig:
        for name in ("tp", "weight_bits"):
            if name in self.model_fields_set and not self.model_shape:
                raise ValueError(f"{name}: expected model_shape beside it, got none")
        if self.gpu and not (
            self.model_shape or self.profile or "latency" in self.model_fields_set
        ):
            raise ValueError(
                "gpu: expected model_shape beside it, got none; nothing is predicted then"
            )
        if self.model_shape and not self.gpu and not self.profile:
            raise ValueError("model_shape: expected gpu beside it, got none")
        if self.api_key_env and self.api_key_file:
            raise ValueError("expected api_key_env or api_key_file, got both")
        if self.api_key_env or self.api_key_file:
            key = read_key(self.api_key_env, self.api_key_file, min_length=1)
            self._authorization = f"Bearer {key}"
        if self.url.startswith("https:"):
            self._tls = self.tls.loaded()
        self._profile = self._latency_profile()
        self.build()
        return self
