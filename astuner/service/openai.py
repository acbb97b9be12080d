"""OpenAI-compatible endpoints (and the other dialects) for the base model and checkpoints.

`model` names the base model or a checkpoint by its tinker:// path. The answering is all
`model_tuner`'s: each tenant and model has one of its servers and one session of it, which
records nothing. What is ours is whose model it is, and that sequences queue fairly with
those of sample requests.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from astuner.chat.protocol import ChatCodec
from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import AstunerError, RequestError
from astuner.model_tuner import SessionSampling, SessionSpec, TunerServer
from astuner.model_tuner.exchange import api_key_of
from astuner.model_tuner.wire import error_json, status_of
from astuner.service.names import SCHEME, parse_path
from astuner.service.records import CheckpointRecord
from astuner.service.service import Service
from astuner.service.tenants import Tenants

MAX_SERVERS = 32
"""Distinct (tenant, model) pairs that are kept ready."""
CALL_TIMEOUT = 600.0
ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/models",
    "/v1/responses",
)
"""Those that are measured by name."""
_CREDENTIALS = (b"authorization", b"api-key", b"x-api-key")


class WeightsEngine:
    """An `Engine` over the host with one set of weights, for one tenant."""

    def __init__(self, service: Service, tenant: str, weights: str) -> None:
        """`weights` is a key of the shelf, or "" for the base model."""
        self.max_context = service.base.host.max_context
        self._service = service
        self._tenant = tenant
        self._weights = weights

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        service = self._service
        lane = f"openai:{self._weights}"
        service.sample_requests.check_waiting(self._tenant, 1)
        async with (
            service.drawing.turn(self._tenant, lane),
            service.shelf.use(self._weights) as snapshot,
        ):
            tokens = 0
            stream = service.base.host.stream(
                prompt_ids, params, weights=snapshot, tenant=self._tenant
            )
            try:
                async for chunk in stream:
                    tokens += len(chunk.token_ids)
                    yield chunk
            finally:
                close = getattr(stream, "aclose", None)
                if close is not None:
                    await close()
                service.observer.sampled(self._tenant, tokens, len(prompt_ids))


@dataclass(slots=True, eq=False)
class _Ready:
    """A server of `model_tuner` for one tenant and model, and the key of its session."""

    server: TunerServer
    key: str
    model: str
    tenant: str
    weights: str
    holder: str
    users: int = 0
    """Requests at hand."""


class OpenAIEndpoints:
    """The ASGI app below /v1."""

    def __init__(self, service: Service, tenants: Tenants) -> None:
        self._service = service
        self._tenants = tenants
        self._ready: OrderedDict[tuple[str, str], _Ready] = OrderedDict()
        self._replaced: list[_Ready] = []
        """No longer found; closed when nobody uses them any more."""
        service.chores.add("closing models of the chat endpoints", self.close_old)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            tenant = self._tenants.find(api_key_of(scope["headers"]) or _x_api_key(scope))
            scope.setdefault("state", {})["tenant"] = tenant
            if scope["path"].startswith("/v1/models"):
                await self._models(scope, tenant)(scope, receive, send)
                return
            scope["state"]["route"] = scope["path"] if scope["path"] in ROUTES else "/v1"
            body = await self._body(receive)
            ready = self._server(tenant, _model_of(body) or self._service.base.name)
        except AstunerError as error:
            status, code = status_of(error)
            payload = error_json(str(error), status, code, getattr(error, "param", None))
            await JSONResponse(payload, status)(scope, receive, send)
            return
        ready.users += 1
        try:
            await ready.server.app(_signed(scope, ready.key), _replayed(body, receive), send)
        finally:
            ready.users -= 1

    def _models(self, scope: Scope, tenant: str) -> JSONResponse:
        """What may be named: the base model, and the tenant's sampler checkpoints."""
        names = [self._service.base.name]
        checkpoints = self._service.checkpoints.of_tenant(tenant)
        names += [str(c.path) for c in checkpoints if c.kind == "sampler_weights"]
        models = [{"id": n, "object": "model", "created": 0, "owned_by": tenant} for n in names]
        asked = scope["path"].removeprefix("/v1/models").strip("/")
        if not asked:
            return JSONResponse({"object": "list", "data": models})
        if asked not in names:
            raise _no_model(asked)
        return JSONResponse(models[names.index(asked)])

    def _server(self, tenant: str, model: str) -> _Ready:
        checkpoint = self._checkpoint(tenant, model)
        weights = "" if checkpoint is None else checkpoint.weights
        ready = self._ready.get((tenant, model))
        if ready is None or ready.weights != weights:
            if ready is not None:
                self._replaced.append(ready)
            ready = self._make(tenant, model, checkpoint)
            self._ready[tenant, model] = ready
        self._ready.move_to_end((tenant, model))
        return ready

    async def close_old(self) -> None:
        """Give back what was replaced, whose checkpoint is gone, or that is one too many."""
        for pair, ready in list(self._ready.items()):
            if len(self._ready) > MAX_SERVERS or not self._is_current(ready):
                self._replaced.append(self._ready.pop(pair))
        for ready in [r for r in self._replaced if not r.users]:
            self._replaced.remove(ready)
            ready.server.close()
            await self._service.shelf.let_go(ready.weights, ready.holder)

    def _is_current(self, ready: _Ready) -> bool:
        try:
            checkpoint = self._checkpoint(ready.tenant, ready.model)
        except RequestError:
            return False
        return ready.weights == ("" if checkpoint is None else checkpoint.weights)

    def _checkpoint(self, tenant: str, model: str) -> CheckpointRecord | None:
        """None for the base model. Raises RequestError (404)."""
        if model == self._service.base.name:
            return None
        if not model.startswith(SCHEME):
            raise _no_model(model)
        return self._service.checkpoints.find(parse_path(model), tenant, reading=True)

    def _make(self, tenant: str, model: str, checkpoint: CheckpointRecord | None) -> _Ready:
        weights, holder = "", f"openai:{uuid.uuid4().hex}"
        if checkpoint is not None:
            weights = checkpoint.weights
            folder = self._service.checkpoints.folder(checkpoint)
            self._service.shelf.hold(weights, holder, folder)
        engine = WeightsEngine(self._service, tenant, weights)
        server = TunerServer(engine, self._codec(), model_name=model, call_timeout=CALL_TIMEOUT)
        sampling = SessionSampling(max_tokens=engine.max_context, override=False)
        session = server.open_session(SessionSpec(tenant, sampling=sampling, record=False))
        key = session.agent("default", "default").api_key
        return _Ready(server, key, model, tenant, weights, holder)

    def _codec(self) -> ChatCodec:
        if self._service.codec is None:
            raise RequestError(
                f"{self._service.base.name!r} has no tokenizer here that can render messages.",
                code="no_chat_template",
            )
        return self._service.codec

    async def _body(self, receive: Receive) -> bytes:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._service.limits.max_request_bytes:
                raise RequestError("The request is too large.", status=413, code="too_large")
            if not message.get("more_body", False):
                return body


def _model_of(body: bytes) -> str | None:
    """The model that the request names; None where it names none, or is no JSON object."""
    try:
        data: Any = from_json(body or b"{}")
    except ValueError:
        return None
    model = data.get("model") if isinstance(data, dict) else None  # pyright: ignore[reportUnknownMemberType]
    return model if isinstance(model, str) and model else None


def _no_model(name: str) -> RequestError:
    return RequestError(
        f"There is no model {name[:200]!r} here. GET /v1/models lists those that there are.",
        status=404,
        code="model_not_found",
        param="model",
    )


def _x_api_key(scope: Scope) -> str | None:
    found = [value for name, value in scope["headers"] if name == b"x-api-key"]
    return found[0].decode("latin-1") if found else None


def _signed(scope: Scope, key: str) -> Scope:
    """The same request with the session's key in place of the tenant's."""
    headers = [(n, v) for n, v in scope["headers"] if n not in _CREDENTIALS]
    return {**scope, "headers": [*headers, (b"authorization", f"Bearer {key}".encode())]}


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` again from the start of the body."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
