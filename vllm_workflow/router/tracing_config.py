"""The `tracing` of `router.yaml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.yaml_config import Strict

if TYPE_CHECKING:
    from vllm_workflow.router.tracing import Tracing


class TracingConfig(Strict):
    """Where spans go; see `router.tracing`."""

    otlp_endpoint: str
    """URL that takes OTLP over HTTP, e.g. `http://127.0.0.1:4318/v1/traces`."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the traces begun here that are kept; where a client traces, its decision holds."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("expected http://… or https://…")
        return url

    def build(self) -> Tracing:
        """Raises: ConfigError: OpenTelemetry is not installed."""
        try:
            from vllm_workflow.router.tracing import Tracing  # most routers do not trace
        except ModuleNotFoundError as e:
            if e.name is None or not e.name.startswith("opentelemetry"):
                raise
            raise ConfigError(
                f"tracing: Python package {e.name!r} is missing; install it with: "
                "pip install 'vllm-workflow[tracing]'"
            ) from None
        return Tracing(self.otlp_endpoint, self.sample_ratio)
