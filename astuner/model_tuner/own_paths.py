"""Addresses that belong to one session: `http://host:port/s12/v1` leads where `/v1` does.

Some frameworks keep HTTP clients for as long as the process lives, by their address
(LangChain does), while every episode has an event loop of its own: with one address for
all, an episode would be handed connections of another's loop. The path says nothing else;
who is asking is in the key.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp

OWN = re.compile(r"/s\d+(?=/)")


def own_base_url(base_url: str, number: int) -> str:
    """`base_url`, which ends with /v1, as the session of this number has it."""
    return f"{base_url.removesuffix('/v1')}/s{number}/v1"


class OwnPaths:
    """The app, also at the sessions' own addresses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] == "http" and (own := OWN.match(scope["path"])):
            scope["path"] = scope["path"][own.end() :]
            scope["raw_path"] = scope["path"].encode()
        await self._app(scope, receive, send)
