"""One HTTP request and its answer, at the level of ASGI.

It reads the body, finds the key, tells errors in the dialect's shape, and stops the
call when the client leaves or the episode ends. Plain ASGI instead of request
and response objects: this is the hot path. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any

from pydantic_core import to_json

from astuner.errors import AstunerError, DeadlineExceeded, EngineError
from astuner.model_tuner.attempts import Claim
from astuner.model_tuner.session import (
    KEY_PREFIX,
    AgentKey,
    Flight,
    Problem,
    SessionBook,
    episode_ended,
)
from astuner.model_tuner.sse import Events, EventStream
from astuner.model_tuner.wire import (
    OPENAI_ERRORS,
    ErrorShape,
    parse_json,
    retry_header,
    status_of,
)
from astuner.types import FailureKind

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
IDEMPOTENCY_KEY = b"idempotency-key"
RETRY_COUNT = b"x-stainless-retry-count"
"""How the openai and anthropic SDKs say that they ask again."""


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class Exchange:
    """What an endpoint gets: the request, and how to answer it."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, errors: ErrorShape = OPENAI_ERRORS
    ) -> None:
        self._scope = scope
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.method: str = scope["method"]
        self._receive = receive
        self._send = send
        self._errors = errors
        self._body = b""
        self.stream = EventStream(send)
        """Server-sent events, for a request with `stream`."""

    @property
    def connection(self) -> tuple[Scope, Receive, Send]:
        return self._scope, self._receive, self._send

    @property
    def events(self) -> Events:
        """Where chunks of OpenAI's chat and completions go."""
        return self.stream

    async def json(self) -> dict[str, Any]:
        """The request's body. Raises RequestError, ClientGone."""
        body = b""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if not message.get("more_body", False):
                self._body = body
                return parse_json(body)

    @property
    def api_key(self) -> str | None:
        return api_key_of(self._headers)

    @property
    def claim(self) -> Claim:
        """What tells this request from others and from its own repetitions."""
        headers = {
            name: value.decode("latin-1")
            for name, value in self._headers
            if name in (IDEMPOTENCY_KEY, RETRY_COUNT)
        }
        digest = blake2b(self._scope["path"].encode() + b"\0" + self._body, digest_size=16)
        again = headers.get(RETRY_COUNT, "0").strip() not in ("", "0")
        return Claim(digest.digest(), headers.get(IDEMPOTENCY_KEY), again)

    async def reply(
        self,
        payload: Any,
        status: int = 200,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Answer with JSON."""
        body = to_json(payload)
        length = (b"content-length", str(len(body)).encode())
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [JSON, length, *headers]}
        )
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: AstunerError) -> None:
        """Answer with the dialect's error JSON; within a stream, as its last event."""
        status, code = status_of(error)
        payload = self._errors.body(str(error), status, code, getattr(error, "param", None))
        if self.stream.started:
            name, event = self._errors.event(payload, self.stream.sent)
            await self.stream.send(event, name)
            await self.stream.end()
        else:
            await self.reply(payload, status, retry_header(status, code))

    @asynccontextmanager
    async def flight(self, agent: AgentKey) -> AsyncGenerator[Flight]:
        """The time in which the call can be stopped. Raises ClientGone when the client
        left, RequestError when the episode ended; what was sampled is then forgotten."""
        session = agent.session
        flight = session.take_off(agent)
        watcher = asyncio.create_task(self._watch(flight))
        answered = False
        try:
            yield flight
            answered = True
        except asyncio.CancelledError:
            if flight.reason is None:
                raise
            _uncancel()
            if flight.reason == "ended":
                session.count("ended_in_flight")
                raise episode_ended(session.spec.episode_id) from None
            session.count("disconnected")
            raise ClientGone from None
        finally:
            watcher.cancel()
            session.land(agent, flight, answered=answered)

    async def _watch(self, flight: Flight) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        flight.stop("disconnected")


def api_key_of(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """From `Authorization: Bearer KEY`, `x-api-key: KEY` or `api-key: KEY`.

    Of several, one of ours: an SDK may send along what it found in the environment."""
    keys: list[str] = []
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            keys.append(value[7:].decode("latin-1").strip())
        elif name in (b"x-api-key", b"api-key"):
            keys.append(value.decode("latin-1").strip())
    return next((key for key in keys if key.startswith(KEY_PREFIX)), keys[0] if keys else None)


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


class Endpoint:
    """An ASGI app that answers with a session's key and refuses in the dialect's shape."""

    errors: ErrorShape = OPENAI_ERRORS

    def __init__(self, sessions: SessionBook) -> None:
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self.errors)
        agent: AgentKey | None = None
        try:
            agent = self._sessions.find(exchange.api_key)
            await self.answer(agent, exchange)
        except ClientGone:
            return
        except AstunerError as error:
            if agent is not None and not agent.session.closed:
                agent.session.note(problem(error, agent))
            await exchange.refuse(error)

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        """Answer one authenticated request; AstunerErrors become its error JSON."""
        raise NotImplementedError


def problem(error: AstunerError, agent: AgentKey) -> Problem:
    """What the session remembers of an error."""
    status, code = status_of(error)
    kind = FailureKind.WORKFLOW
    if isinstance(error, DeadlineExceeded):
        kind = FailureKind.TIMEOUT
    elif isinstance(error, EngineError) and status >= 500:
        kind = FailureKind.ENGINE
    return Problem(kind, code, status, str(error), agent.agent_name, agent.target_tag)
