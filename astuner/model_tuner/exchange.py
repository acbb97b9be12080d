"""One HTTP request and its answer, at the level of ASGI.

It reads the body, finds the key, turns errors into OpenAI's JSON, and stops the
call when the client leaves or the episode ends. Plain ASGI instead of request
and response objects: this is the hot path. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pydantic_core import to_json

from astuner.errors import AstunerError, DeadlineExceeded, EngineError
from astuner.model_tuner.session import AgentKey, Flight, Problem, SessionBook, episode_ended
from astuner.model_tuner.sse import EventStream
from astuner.model_tuner.wire import error_json, parse_json, retry_header, status_of
from astuner.types import FailureKind

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class Exchange:
    """What an endpoint gets: the request, and how to answer it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self._receive = receive
        self._send = send
        self.events = EventStream(send)
        """Server-sent events, for a request with `stream`."""

    async def json(self) -> dict[str, Any]:
        """The request's body. Raises RequestError, ClientGone."""
        body = b""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return parse_json(body)

    @property
    def api_key(self) -> str | None:
        return api_key_of(self._headers)

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
        """Answer with OpenAI's error JSON; within a stream, as its last event."""
        status, code = status_of(error)
        payload = error_json(str(error), status, code, getattr(error, "param", None))
        if self.events.started:
            await self.events.send(payload)
            await self.events.end()
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
    """From `Authorization: Bearer KEY` or `api-key: KEY`."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].decode("latin-1").strip()
        if name == b"api-key":
            return value.decode("latin-1").strip()
    return None


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


class Endpoint:
    """An ASGI app that answers with a session's key and refuses in OpenAI's shape."""

    def __init__(self, sessions: SessionBook) -> None:
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        agent: AgentKey | None = None
        try:
            agent = self._sessions.find(exchange.api_key)
            await self.answer(agent, exchange)
        except ClientGone:
            return
        except AstunerError as error:
            if agent is not None and not agent.session.closed:
                agent.session.note(problem(error, agent.agent_name))
            await exchange.refuse(error)

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        """Answer one authenticated request; AstunerErrors become its error JSON."""
        raise NotImplementedError


def problem(error: AstunerError, agent_name: str) -> Problem:
    """What the session remembers of an error."""
    status, code = status_of(error)
    kind = FailureKind.WORKFLOW
    if isinstance(error, DeadlineExceeded):
        kind = FailureKind.TIMEOUT
    elif isinstance(error, EngineError) and status >= 500:
        kind = FailureKind.ENGINE
    return Problem(kind, code, status, str(error), agent_name)
