"""The `discovery` of `router.yaml`: where instances are found that come and go."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from vllm_workflow.router.instance_config import InstanceConfig
from vllm_workflow.yaml_config import Strict, validated

_KUBERNETES = "/var/run/secrets/kubernetes.io/serviceaccount"
_Seconds = Annotated[float, Field(gt=0, le=3600)]


class FileSource(Strict):
    """A YAML file with a list of instances, as `instances` in `router.yaml`."""

    path: Annotated[str, Field(min_length=1)]
    every_s: _Seconds = 1.0
    """How often it is looked at for a change."""

    @property
    def label(self) -> str:
        """Tells it from other sources, in logs too."""
        return f"file {self.path}"


class _Templated(Strict):
    template: dict[str, Any] = Field(default_factory=dict)
    """Fields of an instance, but for `url` and `id`, that all of these share."""

    @field_validator("template")
    @classmethod
    def _fits(cls, template: dict[str, Any]) -> dict[str, Any]:
        if own := {"url", "id"} & set(template):
            raise ValueError(f"expected no {sorted(own)}, which are found")
        validated(InstanceConfig, {**template, "url": "http://found:1"}, source="template")
        return template


class DnsSource(_Templated):
    """One instance per address of a name, e.g. of a headless service."""

    name: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)]
    scheme: Annotated[str, Field(pattern="^https?$")] = "http"
    every_s: _Seconds = 5.0

    @property
    def label(self) -> str:
        """Tells it from other sources, in logs too."""
        return f"dns {self.name}:{self.port}"


class KubernetesSource(_Templated):
    """One instance per ready endpoint of a service, from its EndpointSlices."""

    service: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")] = "default"
    port: str | int = ""
    """Name or number of the port; the first if empty."""
    scheme: Annotated[str, Field(pattern="^https?$")] = "http"
    every_s: _Seconds = 2.0
    api_url: Annotated[str, Field(pattern="^https?://")] = "https://kubernetes.default.svc"
    token_file: str = f"{_KUBERNETES}/token"
    """Read before each question: tokens are renewed."""
    ca_file: str = f"{_KUBERNETES}/ca.crt"

    @property
    def cluster(self) -> str:
        """Equal to that of another source whose namespaces are the same ones."""
        return self.api_url.rstrip("/")

    @property
    def label(self) -> str:
        """Tells it from other sources, in logs too."""
        port = f":{self.port}" if self.port != "" else ""
        where = f" at {self.api_url}" if "api_url" in self.model_fields_set else ""
        return f"kubernetes {self.namespace}/{self.service}{port}{where}"


SourceConfig = FileSource | DnsSource | KubernetesSource


class DiscoveryConfig(Strict):
    """Any number of each."""

    files: list[FileSource] = Field(default_factory=list)
    dns: list[DnsSource] = Field(default_factory=list)
    kubernetes: list[KubernetesSource] = Field(default_factory=list)

    @property
    def sources(self) -> list[SourceConfig]:
        """All of them."""
        return [*self.files, *self.dns, *self.kubernetes]

    @model_validator(mode="after")
    def _unique(self) -> DiscoveryConfig:
        labels = [source.label for source in self.sources]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"declared twice: {twice}")
        return self
