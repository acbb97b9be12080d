"""The Starlette app: routes, keys, request ids, and errors as the SDK shows them to its user.

Requests that are wrong are 4xx and never 5xx or 408/409, which the SDK would send again
for minutes; 429 is kept for "not now", and 503 for records that cannot be kept. Every
answer carries an X-Request-Id. A bug of ours is a 500 that names it, and touches no other
request.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astuner.errors import AstunerError, CheckpointError, RequestError
from astuner.service.service import Service
from astuner.service.tenants import Tenants
from astuner.service.wire.archives import ArchiveEndpoints
from astuner.service.wire.intake import Intake
from astuner.service.wire.rest import RestEndpoints
from astuner.service.wire.sampling import SamplingEndpoints
from astuner.service.wire.start import StartEndpoints
from astuner.service.wire.training import TrainingEndpoints

logger = logging.getLogger(__name__)

Handler = Callable[[Request, str], Awaitable[Response]]
"""Answers the request of a tenant."""
API = "/api/v1"
METHODS = ("GET", "POST", "PUT", "DELETE")
PUBLIC = ("/healthz", ArchiveEndpoints.PUBLIC)
"""Paths that are answered without a key."""


def build_app(service: Service, tenants: Tenants, openai: ASGIApp | None = None) -> ASGIApp:
    """The whole HTTP surface. `openai` answers everything below /v1."""

    def route(method: str, path: str, handler: Handler, *, public: bool = False) -> Route:
        async def answer(request: Request) -> Response:
            request.state.route = f"{API}{path}"
            tenant = "" if public else tenants.find(request.headers.get("x-api-key"))
            request.state.tenant = tenant
            return await handler(request, tenant)

        return Route(f"{API}{path}", answer, methods=[method])

    parts = (
        StartEndpoints(service),
        TrainingEndpoints(service),
        SamplingEndpoints(service),
        RestEndpoints(service),
        ArchiveEndpoints(service),
    )
    routes: list[Any] = [
        route(method, path, handler, public=path in PUBLIC)
        for part in parts
        for method, path, handler in part.routes()
    ]
    if openai is not None:
        routes.append(Route("/v1/{rest:path}", openai))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    handlers: dict[Any, Any] = {
        AstunerError: _refused,
        HTTPException: _http_error,
        Exception: _bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Observed(Intake(app, service.limits.max_waiting_bytes), service)


class Observed:
    """Gives each request an id and a span, and keeps a bug of ours to its own request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._observer = service.observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
                seen["http.response.status_code"] = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "other"
        with self._observer.request(method, request_id) as seen:
            try:
                await self.app(scope, receive, sending)
            except Exception:  # Starlette has answered; one request's bug is one request's
                logger.exception("request %s %s", request_id, scope["path"])
            state = scope.get("state", {})
            seen["tenant"] = state.get("tenant", "")
            seen["http.route"] = state.get("route", "other")


async def _refused(_: Request, error: AstunerError) -> JSONResponse:
    status, code, param = 400, type(error).__name__, None
    if isinstance(error, CheckpointError):  # the store's trouble, which may pass
        status = 503
    if isinstance(error, RequestError):
        status, code, param = error.status, error.code or "invalid_request", error.param
    body = {"detail": str(error), "code": code, "param": param}
    return JSONResponse({k: v for k, v in body.items() if v is not None}, status)


async def _bug(_: Request, error: Exception) -> JSONResponse:
    detail = f"A bug in the service: {type(error).__name__}: {error}"
    return JSONResponse({"detail": detail, "code": "internal_error"}, 500)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    detail = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse({"detail": detail, "code": "no_such_route"}, error.status_code)
