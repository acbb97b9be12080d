"""An `Engine` over what gives whole answers: a trainer's own inference engine.

It lives on one event loop of the trainer's, and is asked from any thread and loop. A whole
answer becomes the chunks of a stream. A caller who leaves cancels the await. What the
trainer's side raises passes through: the proxy makes EngineErrors of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import ContextLengthError, EngineClosed
from astuner.types import FinishReason


@dataclass(frozen=True)
class Answer:
    """A whole completion."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    oldest: int
    """Weights that may have sampled it. Where the newest differ nobody tells at which token."""
    newest: int
    cached: int = 0
    """Tokens of the prompt that were not computed anew."""


class AnswerEngine:
    """An `Engine`; what is asked, and how, a subclass says in `sample`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        max_context: int,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """`loop` is the one that `sample` runs on."""
        self.max_context = max_context
        self.version = 0
        """The newest weights that were seen to answer."""
        self.answers = 0
        self._loop = loop
        self._on_answer = on_answer

    def sample(
        self, prompt_ids: list[int], params: SamplingParams, limit: int
    ) -> Coroutine[Any, Any, Answer]:
        """An answer of 1 to `limit` tokens, with a logprob each. Raises EngineError."""
        raise NotImplementedError

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        """See `Engine.stream`."""
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(len(prompt_ids), self.max_context)
        limit = min(params.max_tokens, room)
        answer = await self._on_its_loop(self.sample(list(prompt_ids), params, limit))
        self.version = max(self.version, answer.newest)
        self.answers += 1
        self._on_answer()
        for chunk in chunks(answer, params, limit):
            yield chunk

    async def _on_its_loop(self, asked: Coroutine[Any, Any, Answer]) -> Answer:
        try:
            future = asyncio.run_coroutine_threadsafe(asked, self._loop)
        except RuntimeError as error:
            asked.close()
            raise EngineClosed("The trainer's process that plays episodes has ended.") from error
        return await asyncio.wrap_future(future)


def chunks(answer: Answer, params: SamplingParams, limit: int) -> list[TokenChunk]:
    """Of an answer of at most `limit` tokens. Where its weights differ the last token is of the
    newest, and all before count as of the oldest."""
    ids, scores = tuple(answer.token_ids), tuple(answer.logprobs)
    oldest, newest, cached = answer.oldest, answer.newest, answer.cached
    top = tuple({i: p} for i, p in zip(ids, scores, strict=True)) if params.top_logprobs else ()
    finish = finish_reason(ids, params, limit)
    if oldest == newest or len(ids) < 2:
        return [TokenChunk(ids, scores, newest, finish, top, cached)]
    return [
        TokenChunk(ids[:-1], scores[:-1], oldest, None, top[:-1], cached),
        TokenChunk(ids[-1:], scores[-1:], newest, finish, top[-1:]),
    ]


def finish_reason(ids: Sequence[int], params: SamplingParams, limit: int) -> FinishReason:
    """Such engines say the same of an answer that stopped and of one that was cut."""
    return "length" if len(ids) >= limit and ids[-1] not in params.stop_token_ids else "stop"
