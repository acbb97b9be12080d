"""How much of all requests' bodies the server has in memory, and that it is bounded.

Bytes count from when they are read until the request is answered. Whoever would exceed
the bound is told to come again (429), before more is read; a tenant may have half of it.
"""

from __future__ import annotations

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astuner.errors import RequestError


class Intake:
    """An ASGI app around another that puts the tenant into the scope's state before it reads."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.held: Counter[str] = Counter()
        """Bytes, by tenant."""
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mine, tenant = 0, ""

        async def counted() -> Message:
            nonlocal mine, tenant
            message = await receive()
            size = len(message.get("body", b""))
            if size:
                tenant = scope.get("state", {}).get("tenant", "")
                self._check(tenant, size)
                self.held[tenant] += size
                mine += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self.held[tenant] -= mine

    def _check(self, tenant: str, more: int) -> None:
        whole = self.held.total() + more
        if whole > self._max or self.held[tenant] + more > self._max // 2:
            raise RequestError(
                "The server has many requests at hand, of you or of all; try again later.",
                status=429,
                code="too_many_bytes",
            )
