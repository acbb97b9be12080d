"""An httpx transport that calls the proxy's app in the caller's own loop, without a socket.

Unlike httpx's ASGITransport it hands over the body as it is produced, so that
streaming works, and closing a response early tells the app that the client left.
httpx's timeouts do not apply; the proxy has a deadline of its own. SDKs that are built
on httpx2, its successor, get answers of that library's classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import cache
from types import ModuleType
from typing import Any, Self

import httpx
from starlette.types import ASGIApp


class InProcessTransport:
    """For `AsyncClient(transport=...)` of the library `http`: httpx or httpx2.

    Of neither library's class, as one refuses what is of the other's."""

    def __init__(self, app: ASGIApp, http: ModuleType = httpx) -> None:
        self._app = app
        self._http = http
        self._body = _stream_of(http)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connection = _Connection(await request.aread(), self._http.RemoteProtocolError)
        connection.run(self._app, _scope(request))
        try:
            status, headers = await connection.started
        except asyncio.CancelledError:
            connection.leave()
            raise
        return self._http.Response(status, headers=headers, stream=self._body(connection))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def aclose(self) -> None:
        return


@cache
def _stream_of(http: ModuleType) -> Any:
    """The body as this library's responses want it."""
    return type("_Stream", (_Body, http.AsyncByteStream), {})


class _Connection:
    """One request between the client's task and the app's."""

    def __init__(self, body: bytes, broken: Callable[[str], Exception]) -> None:
        self._body: bytes | None = body
        self._broken = broken
        self._left = asyncio.Event()
        self.started: asyncio.Future[tuple[int, Any]] = asyncio.get_running_loop().create_future()
        self.chunks: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    def run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        async def call() -> None:
            await app(scope, self._receive, self._send)

        self._task = asyncio.create_task(call())
        self._task.add_done_callback(self._ended)

    def leave(self) -> None:
        """The client does not want more."""
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if not self.started.done():
                self.started.set_result((message["status"], message.get("headers", [])))
            return
        if message.get("body"):
            self.chunks.put_nowait(message["body"])
        if not message.get("more_body", False):
            self.chunks.put_nowait(None)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The app returned, with or without a whole answer."""
        broken = self._broken("The proxy ended without an answer.")
        if not task.cancelled():
            broken.__cause__ = task.exception()
        if not self.started.done():
            self.started.set_exception(broken)
        self.chunks.put_nowait(broken)


class _Body:
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self._connection.chunks.get()) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def aclose(self) -> None:
        self._connection.leave()


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.split(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": ("in-process", 0),
        "root_path": "",
    }
