"""POST /v1/completions: a raw prompt in, raw text out, every token recorded.

Prompts are text (encoded as it is, no template) or token ids, one or many; each
prompt's `n` choices are Calls of their own that start a new timeline by name
("raw_prompt"), which the tracker still joins where tokens are a prefix.
`echo` and `suffix` are refused (see `wire`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

from astuner.chat.protocol import ChatCodec
from astuner.errors import RequestError
from astuner.model_tuner import sampling
from astuner.model_tuner.deltas import Deltas
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.reply import Reply, Turn, usage
from astuner.model_tuner.serving import Serving
from astuner.model_tuner.session import AgentKey
from astuner.model_tuner.sse import Events
from astuner.model_tuner.stops import StopStrings
from astuner.model_tuner.wire import CompletionRequest, parse_request
from astuner.types import TokenIds, token_ids


class Completions(Endpoint):
    """The endpoint."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving.sessions)
        self._serving = serving

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        data = await exchange.json()
        request = parse_request(CompletionRequest, data)
        shown: Shown | None = None
        with agent.attempts.take(exchange.claim) as attempt:
            if attempt.answered is not None:
                agent.session.count("answered_again")
            else:
                async with exchange.flight(agent):
                    prompts = encode_prompts(request.prompt, self._serving.codec)
                    turns = [self._turn(agent, request, data, prompt) for prompt in prompts]
                    replies = [Reply(turn, i) for i, turn in enumerate(_each(turns, request.n))]
                    shown = Shown(self._serving, request, prompts, replies, exchange.events)
                    await self._serving.sample(replies, shown.grow if request.stream else None)
                    _record(agent, replies, shown)
                    attempt.answered = prompts, replies
        prompts, replies = attempt.answered
        shown = shown or Shown(self._serving, request, prompts, replies, exchange.events)
        if request.stream:
            await shown.finish()
        else:
            await exchange.reply(shown.response())

    def _turn(
        self, agent: AgentKey, request: CompletionRequest, data: dict[str, Any], prompt: TokenIds
    ) -> Turn:
        codec, draw = self._serving.codec, sampling.resolve(request, agent.session.spec)
        length = sampling.max_tokens(
            request.max_tokens, agent, len(prompt), self._serving.engine.max_context
        )
        if draw.overridden:
            agent.session.count("overridden_sampling")
        return Turn(
            agent,
            data,
            prompt,
            sampling.params(draw, length, codec.stop_token_ids, request.logprobs or 0),
            StopStrings(request.stop, codec),
            draw.seed,
            new_timeline_reason="raw_prompt",
        )


def _each(turns: Sequence[Turn], n: int) -> list[Turn]:
    return [turn for turn in turns for _ in range(n)]


def _record(agent: AgentKey, replies: Sequence[Reply], shown: Shown) -> None:
    texts = ({"role": "assistant", "content": shown.text(reply)} for reply in replies)
    calls = [(r.number, r.call(text)) for r, text in zip(replies, texts, strict=True)]
    agent.session.record(agent, calls)


def encode_prompts(prompt: object, codec: ChatCodec) -> list[TokenIds]:
    """Each prompt as ids [T]. Raises RequestError for an empty one or another type."""
    many = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    prompts: list[TokenIds] = []
    for one in cast("list[object]", many) if isinstance(many, list) else ():
        if isinstance(one, str):
            prompts.append(codec.encode(one))
        elif _are_ids(one):
            prompts.append(token_ids(cast("list[int]", one)))
        else:
            prompts.clear()
            break
    if not prompts or not all(len(p) for p in prompts):
        raise RequestError(
            "prompt must be a text, token ids (integers from 0), or a list of either, "
            "and none may be empty.",
            code="invalid_value",
            param="prompt",
        )
    return prompts


def _are_ids(prompt: object) -> bool:
    ids = cast("list[object]", prompt) if isinstance(prompt, list) else []
    return len(ids) > 0 and all(type(i) is int and 0 <= i < 2**31 for i in ids)


class Shown:
    """The replies as the client gets them, whole or in chunks."""

    def __init__(
        self,
        serving: Serving,
        request: CompletionRequest,
        prompts: Sequence[TokenIds],
        replies: Sequence[Reply],
        events: Events,
    ) -> None:
        self._serving = serving
        self._codec = serving.codec
        self._request = request
        self._prompts = prompts
        self._replies = replies
        self._events = events
        self._told = [0] * len(replies)
        self._deltas = [Deltas(self._read, r.turn.stops, tools=False) for r in replies]

    def text(self, reply: Reply) -> str:
        """The reply's text, cut before a stop string."""
        return reply.turn.stops.cut(self._codec.decode(reply.ids))[0]

    def response(self) -> dict[str, Any]:
        """The whole response."""
        choices = [self._choice(r, self.text(r), 0, _finish(r)) for r in self._replies]
        return {**self._head(), "choices": choices, "usage": usage(self._replies, self._prompts)}

    async def grow(self, reply: Reply) -> None:
        """Show what can be shown of a reply that has grown."""
        _, text = self._deltas[reply.index].grow(reply.ids)
        if text:
            await self._send(reply, text)

    async def finish(self) -> None:
        """What is left of each text, finish reasons, usage, and the end."""
        for reply in self._replies:
            _, text = self._deltas[reply.index].rest("", self.text(reply))
            await self._send(reply, text, _finish(reply))
        if self._request.include_usage:
            total = usage(self._replies, self._prompts)
            await self._events.send({**self._head(), "choices": [], "usage": total})
        await self._events.done()

    def _read(self, ids: Sequence[int]) -> tuple[str, str]:
        return "", self._codec.decode(ids)

    async def _send(self, reply: Reply, text: str, finish_reason: str | None = None) -> None:
        told, self._told[reply.index] = self._told[reply.index], len(reply.ids)
        choice = self._choice(reply, text, told, finish_reason)
        await self._events.send({**self._head(), "choices": [choice]})

    def _choice(
        self, reply: Reply, text: str, start: int, finish_reason: str | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": reply.index,
            "text": text,
            "logprobs": None if self._request.logprobs is None else self._logprobs(reply, start),
            "finish_reason": finish_reason,
        }
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = reply.turn.prompt_ids.tolist()
            choice["token_ids"] = reply.ids[start:]
        return choice

    def _logprobs(self, reply: Reply, start: int) -> dict[str, Any]:
        texts = [self._codec.decode([i], skip_special=False) for i in reply.ids]
        tops = [
            {self._codec.decode([i], skip_special=False): lp for i, lp in top.items()}
            for top in reply.top[start:]
        ]
        return {
            "tokens": texts[start:],
            "token_logprobs": reply.logprobs[start:],
            "top_logprobs": tops or None,
            "text_offset": [0, *accumulate(map(len, texts))][start:-1],
        }

    def _head(self) -> dict[str, Any]:
        return self._serving.envelope("text_completion", f"cmpl-{self._replies[0].call_id}")


def _finish(reply: Reply) -> str:
    return "length" if reply.finish == "length" else "stop"
