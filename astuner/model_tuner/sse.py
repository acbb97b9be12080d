"""Server-sent events: `data: {json}`, with a name before it where the dialect has names.

The response starts with the first event, so that whatever fails before it is
still a plain HTTP error. It knows nothing of what the events mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from pydantic_core import to_json

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Events(Protocol):
    """Where an endpoint of OpenAI's chat or completions sends its chunks."""

    @property
    def started(self) -> bool: ...

    async def send(self, event: Any) -> None: ...

    async def done(self) -> None: ...


class EventStream:
    """The streamed answer to one request."""

    def __init__(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        self._send = send
        self.sent = 0
        """Events so far."""
        self._started = False

    @property
    def started(self) -> bool:
        return self._started

    async def send(self, event: Any, name: str | None = None) -> None:
        """One event."""
        head = f"event: {name}\n".encode() if name else b""
        await self._write(head + b"data: " + to_json(event) + b"\n\n")
        self.sent += 1

    async def end(self, last: bytes = b"") -> None:
        """Close the response."""
        await self._write(last, more=False)

    async def done(self) -> None:
        """OpenAI's `[DONE]`, and close the response."""
        await self.end(b"data: [DONE]\n\n")

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
