"""One OpenAI-compatible endpoint that requests are passed on to.

A connection a request: calls last seconds and come from many event loops, which
a pooled connection does not outlive. Failures become EngineError (worth a retry)
or RequestError (the endpoint's own 4xx). It does not look into messages.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from astuner.errors import EngineError, RequestError


class Upstream:
    """`POST {base_url}/chat/completions`."""

    def __init__(self, base_url: str, model: str, api_key: str) -> None:
        self.model = model
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Reading the certificates takes longer than many a call: do it once.
        self._verify: ssl.SSLContext | bool = (
            httpx.create_ssl_context() if base_url.startswith("https") else False
        )

    async def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole response."""
        async with self._open(body) as response:
            return self._parsed(await response.aread())

    async def stream(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The response's chunks, up to `[DONE]`."""
        async with self._open(body) as response:
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                if data == "[DONE]":
                    return
                if data:
                    yield self._parsed(data)

    @asynccontextmanager
    async def _open(self, body: Mapping[str, Any]) -> AsyncGenerator[httpx.Response]:
        try:
            # The caller keeps the deadline.
            async with (
                httpx.AsyncClient(verify=self._verify, timeout=None) as client,
                client.stream("POST", self._url, json=dict(body), headers=self._headers) as got,
            ):
                if got.status_code != 200:
                    raise self._refusal(got.status_code, await got.aread())
                yield got
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise EngineError(f"{self._url} could not be reached or broke off: {what}") from error

    def _refusal(self, status: int, body: bytes) -> EngineError | RequestError:
        text = body.decode(errors="replace")[:1000]
        message = f"{self._url} answered {status}: {text}"
        if status in (401, 403):
            hint = "Check the endpoint's base_url, and the key in its api_key_env."
            return RequestError(f"{message}. {hint}", status=400, code="endpoint_refused_key")
        if status in (408, 409, 429) or status >= 500:
            return EngineError(message)
        return RequestError(message, status=status, code=_code(body))

    def _parsed(self, text: bytes | str) -> dict[str, Any]:
        try:
            data: Any = json.loads(text)
        except ValueError as error:
            raise EngineError(f"{self._url} answered no JSON: {text[:200]!r}") from error
        if not isinstance(data, dict) or "error" in data:
            raise EngineError(f"{self._url} failed: {text[:1000]!r}")
        return data


def _code(body: bytes) -> str | None:
    """The `code` of OpenAI's error JSON, where there is one."""
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
