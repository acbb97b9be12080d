"""The routes of the proxy, as one Starlette app.

The same app is served over a socket (`server`) and called in process
(`in_process`). Every answer, also of a wrong path or a bug of ours, has OpenAI's
error shape. It knows no engine and no session.
"""

from __future__ import annotations

import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from astuner.errors import RequestError
from astuner.model_tuner.exchange import Endpoint, Exchange, api_key_of
from astuner.model_tuner.session import AgentKey, Problem, SessionBook
from astuner.model_tuner.wire import error_json
from astuner.types import FailureKind


class Models(Endpoint):
    """GET /v1/models and /v1/models/NAME: the one model that is tuned."""

    def __init__(self, sessions: SessionBook, model_name: str) -> None:
        super().__init__(sessions)
        self._name = model_name
        self._created = int(time.time())

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        name = exchange.path_params.get("model")
        model = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "astuner",
        }
        if name is None:
            await exchange.reply({"object": "list", "data": [model]})
        elif name == self._name:
            await exchange.reply(model)
        else:
            raise RequestError(
                f"There is no model {name!r} here, only {self._name!r}.",
                status=404,
                code="model_not_found",
                param="model",
            )


def build_app(
    chat: Endpoint, completions: Endpoint, sessions: SessionBook, model_name: str
) -> Starlette:
    """The app over these endpoints."""

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": model_name})

    async def bug(request: Request, error: Exception) -> JSONResponse:
        message = f"A bug in astuner's proxy: {type(error).__name__}: {error}"
        agent = sessions.find(api_key_of(request.scope["headers"]))
        agent.session.note(
            Problem(FailureKind.ENGINE, "internal_error", 500, message, agent.agent_name)
        )
        headers = {"x-should-retry": "false"}
        return JSONResponse(error_json(message, 500, "internal_error"), 500, headers)

    models = Models(sessions, model_name)
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: bug}
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", models, methods=["GET"]),
            Route("/health", health),
        ],
        exception_handlers=handlers,
    )


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    status = error.status_code
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    message = f"{request.method} {request.url.path}: {error.detail}. The base URL ends with /v1."
    return JSONResponse(error_json(message, status, code), status, error.headers)
