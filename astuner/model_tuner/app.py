"""The routes of the proxy, as one Starlette app.

The same app is served over a socket (`server`) and called in process
(`in_process`). Every refusal, also of a wrong path or for a bug of ours, has the
shape of the path's dialect. It knows no engine and no session.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from astuner.errors import RequestError
from astuner.model_tuner.dialects.counting import Count, TokenCount
from astuner.model_tuner.dialects.messages import Messages, error_body
from astuner.model_tuner.dialects.response_store import ResponseStore
from astuner.model_tuner.dialects.responses import Responses, StoredResponses
from astuner.model_tuner.dialects.translation import Translated
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
    chat: Endpoint,
    completions: Endpoint,
    sessions: SessionBook,
    model_name: str,
    count: Count | None = None,
) -> Starlette:
    """The app over these endpoints. Without `count`, token counts are not to be had."""

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": model_name})

    async def bug(request: Request, error: Exception) -> JSONResponse:
        message = f"A bug in astuner's proxy: {type(error).__name__}: {error}"
        agent = sessions.find(api_key_of(request.scope["headers"]))
        names = agent.agent_name, agent.target_tag
        agent.session.note(Problem(FailureKind.ENGINE, "internal_error", 500, message, *names))
        headers = {"x-should-retry": "false"}
        return _refusal(request, message, 500, "internal_error", headers)

    models = Models(sessions, model_name)
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: bug}
    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            *_dialects(chat, sessions, count),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{model:path}", models, methods=["GET"]),
            Route("/health", health),
        ],
        exception_handlers=handlers,
    )


def _dialects(chat: Endpoint, sessions: SessionBook, count: Count | None) -> list[Route]:
    """The other dialects, all in front of the same chat endpoint."""
    store = ResponseStore()
    responses, messages = Responses(store), Messages()
    routes = [
        Route("/v1/responses", Translated(responses, chat, sessions), methods=["POST"]),
        Route("/v1/messages", Translated(messages, chat, sessions), methods=["POST"]),
    ]
    if count is not None:
        answer = {"object": "response.input_tokens"}
        counted = TokenCount(responses, count, answer, sessions)
        routes.append(Route("/v1/responses/input_tokens", counted, methods=["POST"]))
        counted = TokenCount(Messages(counting=True), count, {}, sessions)
        routes.append(Route("/v1/messages/count_tokens", counted, methods=["POST"]))
    stored = StoredResponses(store, sessions)
    return [*routes, Route("/v1/responses/{response:path}", stored, methods=["GET", "DELETE"])]


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    status, path = error.status_code, request.url.path
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    hint = "The base URL ends with /v1."
    if path.startswith("/v1/v1/"):
        hint = "The base URL of this client goes without /v1 (as_anthropic_baseurl_apikey)."
    message = f"{request.method} {path}: {error.detail}. {hint}"
    return _refusal(request, message, status, code, error.headers)


def _refusal(
    request: Request, message: str, status: int, code: str, headers: Mapping[str, str] | None
) -> JSONResponse:
    shape = error_body if "/v1/messages" in request.url.path else error_json
    return JSONResponse(shape(message, status, code), status, headers)
