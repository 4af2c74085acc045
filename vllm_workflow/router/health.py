"""What probes are told: none of it depends on how busy anybody is."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web

from vllm_workflow.router.auth import Access, KeyCheck
from vllm_workflow.router.errors import RequestError
from vllm_workflow.router.proxy import Proxy
from vllm_workflow.router.upstreams import Upstreams


class Health:
    """Answers /live, /ready and /health.

    None of them needs a key; where calls need one, /health says names only to who has one.

    Args:
        proxy: Asked for the policy in force.
        upstreams: Asked who is healthy.
        access: Knows clients' keys.
        operator: Knows the operators' key; None if there is none.
    """

    def __init__(
        self, proxy: Proxy, upstreams: Upstreams, access: Access, operator: KeyCheck | None
    ) -> None:
        self._proxy = proxy
        self._upstreams = upstreams
        self._access = access
        self._operator = operator
        self.is_leaving = False
        """Whether load balancers are to send their calls elsewhere."""

    async def live(self, request: web.Request) -> web.Response:
        """Tell that the process answers: restarting it would help nobody."""
        return web.json_response({"live": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Tell whether calls are to come here: an instance is healthy, and the router stays."""
        ready = not self.is_leaving and any(self._healthy().values())
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def health(self, request: web.Request) -> web.Response:
        """Tell whether any instance is healthy, and what runs here."""
        instances = self._healthy()
        ok = any(instances.values())
        body: dict[str, object] = {"healthy": ok}
        if self._access.is_open or self._has_key(request):
            body |= {
                "version": package_version(),
                "policy": self._proxy.policy,
                "instances": instances,
            }
        return web.json_response(body, status=200 if ok else 503)

    def _healthy(self) -> dict[str, bool]:
        return {u.config.id: self._upstreams.is_healthy(u) for u in self._upstreams}

    def _has_key(self, request: web.Request) -> bool:
        """Whether it brings a key that is known here, a client's or the operators'."""
        with suppress(RequestError):
            self._access.caller(request.headers.get("Authorization", ""))
            return True
        if self._operator is not None:
            with suppress(RequestError):
                self._operator.check(request.headers)
                return True
        return False


def package_version() -> str:
    try:
        return version("vllm-workflow")
    except PackageNotFoundError:
        return "unknown"
