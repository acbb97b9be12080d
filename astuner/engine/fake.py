"""A deterministic engine for tests, the debug backbone and benchmarks.

Replies are scripted: token ids, taken one after the other and again from the
start, or computed from the prompt. It keeps the rules of `Engine` (stop tokens,
length limit, context limit, cancellation) and remembers what it was asked. It
knows no text: whoever scripts words encodes them first.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import ContextLengthError, EngineClosed
from astuner.types import FinishReason, token_ids

Reply = Sequence[int] | Exception
"""Token ids to answer with, or an error to raise instead."""


class FakeEngine:
    """Answers from a script. May be used from any thread and loop.

    A reply that runs out without a stop token finishes with "stop" all the same.
    `weight_version` may be set at any time, also in the middle of a reply.
    """

    def __init__(
        self,
        replies: Sequence[Reply] | Callable[[Sequence[int]], Reply],
        *,
        logprob: float | Callable[[int], float] = -0.5,
        weight_version: int = 0,
        max_context: int = 4096,
        chunk_tokens: int = 1,
        seconds_per_token: float = 0.0,
        prefill_cached: int = 0,
    ) -> None:
        """`logprob` is one number for all tokens, or computed from the token id."""
        if not callable(replies) and not replies:
            raise ValueError("FakeEngine needs at least one reply")
        self.weight_version = weight_version
        self.max_context = max_context
        self.prompts: list[tuple[int, ...]] = []
        """Every prompt, in order of arrival."""
        self.params: list[SamplingParams] = []
        """The sampling parameters of the same calls."""
        self.finished = 0
        self.cancelled = 0
        """Streams that were closed, or whose task was cancelled, before their end."""
        self.active = 0
        self.peak_active = 0
        self._replies = replies
        self._logprob = logprob
        self._chunk_tokens = chunk_tokens
        self._seconds_per_token = seconds_per_token
        self._prefill_cached = prefill_cached
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        """Further tokens raise EngineClosed."""
        self._closed = True

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        """See `Engine.stream`."""
        ids, finish = _cut(
            self._admit(prompt_ids, params), params, self.max_context - len(prompt_ids)
        )
        done = False
        try:
            for start in range(0, max(1, len(ids)), self._chunk_tokens):
                piece = tuple(ids[start : start + self._chunk_tokens])
                if self._seconds_per_token:
                    await asyncio.sleep(self._seconds_per_token * len(piece))
                if self._closed:
                    raise EngineClosed("The fake engine was closed.")
                # Whoever holds the last chunk has nothing left to cancel.
                done = start + self._chunk_tokens >= len(ids)
                yield self._chunk(piece, finish if done else None, params, first=start == 0)
        finally:
            self._dismiss(done)

    def _admit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Sequence[int]:
        """Remember the call and take the reply that is due."""
        if self._closed:
            raise EngineClosed("The fake engine was closed.")
        if len(prompt_ids) >= self.max_context:
            raise ContextLengthError(len(prompt_ids), self.max_context)
        prompt = tuple(token_ids(prompt_ids).tolist())
        with self._lock:
            number = len(self.prompts)
            self.prompts.append(prompt)
            self.params.append(params)
        script = self._replies
        reply = script(prompt) if callable(script) else script[number % len(script)]
        if isinstance(reply, Exception):
            raise reply
        with self._lock:
            self.active += 1
            self.peak_active = max(self.peak_active, self.active)
        return reply

    def _dismiss(self, done: bool) -> None:
        with self._lock:
            self.active -= 1
            self.finished += done
            self.cancelled += not done

    def _chunk(
        self,
        ids: tuple[int, ...],
        finish: FinishReason | None,
        params: SamplingParams,
        *,
        first: bool,
    ) -> TokenChunk:
        logprobs = tuple(self._logprob_of(i) for i in ids)
        count = params.top_logprobs
        top = tuple(_alternatives(i, self._logprob_of(i), count) for i in ids) if count else ()
        cached = self._prefill_cached if first else 0
        return TokenChunk(ids, logprobs, self.weight_version, finish, top, cached)

    def _logprob_of(self, token: int) -> float:
        return self._logprob(token) if callable(self._logprob) else self._logprob


def _cut(reply: Sequence[int], params: SamplingParams, room: int) -> tuple[list[int], FinishReason]:
    """The part of a scripted reply that may be sampled, and why it ends there."""
    limit = min(params.max_tokens, room)
    ids: list[int] = []
    for token in reply:
        if len(ids) == limit:
            return ids, "length"
        ids.append(int(token))
        if token in params.stop_token_ids:
            return ids, "stop"
    return ids, "length" if len(ids) >= limit else "stop"


def _alternatives(token: int, logprob: float, count: int) -> Mapping[int, float]:
    """The token itself, then the lowest other ids, each one nat less likely."""
    others = [i for i in range(count) if i != token]
    return {i: logprob - k for k, i in enumerate([token, *others][:count])}
