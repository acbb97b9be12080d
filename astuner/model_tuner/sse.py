"""Server-sent events as OpenAI's clients read them: `data: {json}`, then `data: [DONE]`.

The response starts with the first event, so that whatever fails before it is
still a plain HTTP error. It knows nothing of what the events mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic_core import to_json

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """The streamed answer to one request."""

    def __init__(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> None:
        self._send = send
        self.started = False

    async def send(self, event: Any) -> None:
        """One event."""
        await self._write(b"data: " + to_json(event) + b"\n\n")

    async def end(self, last: bytes = b"") -> None:
        """Close the response."""
        await self._write(last, more=False)

    async def done(self) -> None:
        """`[DONE]`, and close the response."""
        await self.end(b"data: [DONE]\n\n")

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
