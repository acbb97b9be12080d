"""An engine behind HTTP: any endpoint that takes and returns token ids.

It speaks vLLM's `POST /v1/completions` with the prompt as token ids,
`return_token_ids`, `logprobs` and `stream`. Everything that would change the
distribution is sent explicitly, so that no server default (generation_config)
does. It never renders or decodes text and does not load weights: whoever
updates the endpoint sets `weight_version`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import httpx

from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import ContextLengthError, EngineError
from astuner.types import FinishReason

FINISH: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled"}
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # what ends a turn is in stop_token_ids, and nowhere else
    "skip_special_tokens": False,
}


class _Transient(EngineError):
    """Worth another attempt as long as no token has been handed on."""


class RemoteEngine:
    """Continues token ids at `base_url`, e.g. "http://127.0.0.1:8000/v1".

    Each call opens a connection of its own: calls last seconds, come from many
    event loops, and a connection cannot outlive its loop.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str = "EMPTY",
        max_context: int = 8192,
        *,
        weight_version: int = 0,
        processed_logprobs: bool = False,
        timeout: float = 300.0,
        max_retries: int = 2,
        retry_wait: float = 0.5,
    ) -> None:
        """`processed_logprobs` says that the endpoint reports logprobs of the tempered
        distribution (vLLM: `--logprobs-mode processed_logprobs`); without it only
        temperature 0 and 1, untruncated, can be asked for. `timeout` is the longest
        silence in seconds; `retry_wait` doubles with every attempt."""
        self.max_context = max_context
        self.weight_version = weight_version
        self._url = f"{base_url.rstrip('/')}/completions"
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._processed = processed_logprobs
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        self._max_retries = max_retries
        self._retry_wait = retry_wait
        # Reading the certificates takes longer than many a call: do it once.
        self._verify: ssl.SSLContext | bool = (
            httpx.create_ssl_context() if base_url.startswith("https") else False
        )

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        """See `Engine.stream`. Connection errors, 429 and 5xx are tried again until the
        first token has come."""
        prompt = [int(i) for i in prompt_ids]
        self._check(prompt, params)
        started = False
        for attempt in range(self._max_retries + 1):
            try:
                async with aclosing(self._attempt(prompt, params)) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except _Transient:
                if started or attempt == self._max_retries:
                    raise
            await asyncio.sleep(self._retry_wait * 2**attempt)

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        if len(prompt) >= self.max_context:
            raise ContextLengthError(len(prompt), self.max_context)
        plain = params.temperature in (0.0, 1.0) and params.top_p == 1.0 and params.top_k == 0
        if not plain and not self._processed:
            raise EngineError(
                f"temperature {params.temperature}, top_p {params.top_p}, top_k {params.top_k}: "
                f"{self._url} would report logprobs of another distribution than it samples "
                "from. Start the endpoint with `--logprobs-mode processed_logprobs` and pass "
                "processed_logprobs=True, or sample at temperature 1."
            )

    async def _attempt(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        body = self._body(prompt, params)
        try:
            async with (
                httpx.AsyncClient(verify=self._verify, timeout=self._timeout) as client,
                client.stream("POST", self._url, json=body, headers=self._headers) as response,
            ):
                if response.status_code != 200:
                    self._refuse(response.status_code, await response.aread(), len(prompt))
                async for chunk in self._chunks(response, prompt, params.top_logprobs):
                    yield chunk
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            what = str(error) or type(error).__name__
            raise _Transient(f"{self._url} could not be reached or broke off: {what}") from error

    def _body(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        room = self.max_context - len(prompt)
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": min(params.max_tokens, room),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": params.seed,
            "stop_token_ids": list(params.stop_token_ids),
            "logprobs": params.top_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
            **NEUTRAL,
        }

    def _refuse(self, status: int, body: bytes, prompt_tokens: int) -> None:
        text = body.decode(errors="replace")
        if status == 400 and ("context_length" in text or "maximum context length" in text):
            raise ContextLengthError(prompt_tokens, self.max_context)
        kind = _Transient if status == 429 or status >= 500 else EngineError
        raise kind(f"{self._url} answered {status}: {text[:1000]}")

    async def _chunks(
        self, response: httpx.Response, prompt: list[int], alternatives: int
    ) -> AsyncGenerator[TokenChunk, None]:
        finish: FinishReason | None = None
        async for event in _events(response):
            if "error" in event:
                raise _Transient(f"{self._url} failed in mid-stream: {json.dumps(event)[:1000]}")
            for choice in event.get("choices") or ():
                chunk = self._chunk(choice, prompt, alternatives)
                finish = chunk.finish_reason
                yield chunk
        if finish is None:
            raise _Transient(f"{self._url} ended its stream without a finish_reason.")

    def _chunk(self, choice: Mapping[str, Any], prompt: list[int], alternatives: int) -> TokenChunk:
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and list(echoed) != prompt:
            raise EngineError(
                f"{self._url} changed the prompt: sent {len(prompt)} tokens, it used {len(echoed)}."
            )
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs") or ()
        if ids is None or len(ids) != len(values):
            raise EngineError(
                f"{self._url} does not return token ids with a logprob each (token_ids: {ids!r}, "
                f"{len(values)} logprobs). It must know `return_token_ids`, as vLLM >= 0.11 does."
            )
        reason = choice.get("finish_reason")
        return TokenChunk(
            tuple(ids),
            tuple(values),
            self.weight_version,
            FINISH.get(reason, "stop") if reason else None,
            tuple(map(_by_id, logprobs.get("top_logprobs") or ())) if alternatives else (),
        )


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to `[DONE]`."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def _by_id(top: Mapping[str, float] | None) -> dict[int, float]:
    """{"token_id:17": -0.5} as {17: -0.5}."""
    return {int(name.removeprefix("token_id:")): value for name, value in (top or {}).items()}
