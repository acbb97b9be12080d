"""What a client asks first: the server's flags, its models, and a session.

Also heartbeats, the end of a session, and the SDK's own telemetry, which is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from astuner.service.service import Service
from astuner.service.wire.requests import CreateSession, Heartbeat, parse, read_body

FLAGS = {
    "pjwt_auth_enabled": False,
    "credential_default_source": "api_key",
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": False,
    "sample_join_sampling_session": False,
    "use_pyqwest_transport": False,
}
"""Feature flags of the SDK; those not named keep the SDK's own defaults.

Its pyqwest transport is refused: a script that ends while that transport's threads are alive
is aborted at its exit now and then (SDK 0.38, pyqwest 0.12: exit code 134 in 2 of 85
runs on busy cores, none of 240 without). The SDK then uses httpx, as its versions before did."""


class StartEndpoints:
    """See the module."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limit = service.limits.max_request_bytes

    def routes(self) -> Iterator[tuple[str, str, Any]]:
        yield "GET", "/healthz", self.health
        yield "POST", "/client/config", self.config
        yield "POST", "/client/dynamic_config", self.dynamic_config
        yield "GET", "/get_server_capabilities", self.capabilities
        yield "POST", "/create_session", self.create_session
        yield "POST", "/session_heartbeat", self.heartbeat
        yield "POST", "/sessions/{session_id}/finish", self.finish
        yield "POST", "/telemetry", self.telemetry

    async def health(self, request: Request, tenant: str) -> Response:
        """503 once the engine has ended, or has stopped moving: nothing will be answered before
        a restart."""
        if self._service.base.host.stats().doing == "closed":
            return JSONResponse({"status": "the engine has ended"}, 503)
        if stuck := self._service.stuck():
            return JSONResponse({"status": stuck}, 503)
        return JSONResponse({"status": "ok"})

    async def config(self, request: Request, tenant: str) -> Response:
        await read_body(request, self._limit)
        return JSONResponse(FLAGS)

    async def dynamic_config(self, request: Request, tenant: str) -> Response:
        await read_body(request, self._limit)
        return JSONResponse({"sample_cancel_enabled": True})

    async def capabilities(self, request: Request, tenant: str) -> Response:
        model = {
            "model_name": self._service.base.name,
            "max_context_length": self._service.base.host.max_context,
            "trainable": True,
            "sampleable": True,
        }
        return JSONResponse({"supported_models": [model]})

    async def create_session(self, request: Request, tenant: str) -> Response:
        asked = await parse(CreateSession, request, self._limit)
        record = self._service.create_session(
            tenant,
            {
                "sdk_version": asked.sdk_version,
                "display_name": asked.display_name,
                "tags": tuple(asked.tags),
                "user_metadata": asked.user_metadata,
            },
        )
        return JSONResponse({"type": "create_session", "session_id": record.session_id})

    async def heartbeat(self, request: Request, tenant: str) -> Response:
        asked = await parse(Heartbeat, request, self._limit)
        self._service.sessions.alive(asked.session_id, tenant)
        return JSONResponse({"type": "session_heartbeat"})

    async def finish(self, request: Request, tenant: str) -> Response:
        await read_body(request, self._limit)
        await self._service.finish_session(tenant, request.path_params["session_id"])
        return JSONResponse({})

    async def telemetry(self, request: Request, tenant: str) -> Response:
        await read_body(request, self._limit)
        return JSONResponse({"status": "accepted"})
