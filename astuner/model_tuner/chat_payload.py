"""OpenAI's JSON for chat answers: whole responses, and the chunks of a streamed one.

It shows what was sampled and parsed elsewhere; it samples, parses and records
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astuner.chat.protocol import ChatCodec, Message
from astuner.model_tuner.deltas import Deltas
from astuner.model_tuner.reply import Reply, Turn, usage
from astuner.model_tuner.serving import Serving
from astuner.model_tuner.sse import Events
from astuner.model_tuner.tool_choice import ToolUse
from astuner.model_tuner.wire import ChatRequest
from astuner.types import token_ids


@dataclass(frozen=True, slots=True)
class Chat:
    """One request, understood."""

    request: ChatRequest
    messages: Sequence[Message]
    use: ToolUse
    turn: Turn


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished reply as the client gets it."""

    reply: Reply
    message: dict[str, Any]
    """As returned: the text is cut before a stop string, absent parts are left out."""
    finish_reason: str
    stop: str | None = None
    """The stop string that ended it."""


def response_json(serving: Serving, chat: Chat, answers: Sequence[Answer]) -> dict[str, Any]:
    """The whole response."""
    payload = serving.envelope("chat.completion", _response_id(answers[0].reply))
    payload["choices"] = [_choice(serving.codec, chat, answer) for answer in answers]
    payload["usage"] = usage([a.reply for a in answers], [chat.turn.prompt_ids])
    if chat.request.return_token_ids:
        payload["prompt_token_ids"] = chat.turn.prompt_ids.tolist()
    return payload


def _choice(codec: ChatCodec, chat: Chat, answer: Answer) -> dict[str, Any]:
    reply = answer.reply
    choice: dict[str, Any] = {
        "index": reply.index,
        "message": {"refusal": None, **answer.message},
        "logprobs": _logprobs(codec, reply, 0) if chat.request.logprobs else None,
        "finish_reason": answer.finish_reason,
        **_stop_reason(answer),
    }
    if chat.request.return_token_ids:
        choice["token_ids"] = reply.ids
    return choice


def _stop_reason(answer: Answer) -> dict[str, Any]:
    """vLLM's field, only where there is something to tell."""
    return {} if answer.stop is None else {"stop_reason": answer.stop}


def _logprobs(codec: ChatCodec, reply: Reply, start: int) -> dict[str, Any]:
    """Of the tokens from `start`: all that were sampled, so also those that spelled a
    stop string or ended the turn."""

    def token(i: int, logprob: float) -> dict[str, Any]:
        text = codec.decode([i], skip_special=False)
        # A token may be a part of a character: its bytes cannot be told from its text.
        octets = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": octets}

    tops = reply.top[start:] or [{}] * (len(reply.ids) - start)
    rows = zip(reply.ids[start:], reply.logprobs[start:], tops, strict=True)
    content = [
        {**token(i, logprob), "top_logprobs": [token(j, p) for j, p in top.items()]}
        for i, logprob, top in rows
    ]
    return {"content": content, "refusal": None}


class ChatChunks:
    """The chunks of one streamed answer."""

    def __init__(
        self, serving: Serving, chat: Chat, replies: Sequence[Reply], events: Events
    ) -> None:
        self._serving = serving
        self._chat = chat
        self._events = events
        self._replies = replies
        self._begun: set[int] = set()
        self._told = [0] * len(replies)
        tools = bool(chat.use.tools)
        self._deltas = [Deltas(self._read, chat.turn.stops, tools=tools) for _ in replies]

    async def grow(self, reply: Reply) -> None:
        """Show what can be shown of a reply that has grown."""
        reasoning, content = self._deltas[reply.index].grow(reply.ids)
        if reasoning or content:
            await self._send(reply, _delta(reasoning, content))

    async def finish(self, answers: Sequence[Answer]) -> None:
        """What is left of each text, the tool calls, finish reasons, usage, and the end."""
        for answer in answers:
            await self._rest(answer)
            ending = {"finish_reason": answer.finish_reason, **_stop_reason(answer)}
            await self._send(answer.reply, {}, ending)
        if self._chat.request.include_usage:
            await self._emit([], usage=self._usage())
        await self._events.done()

    async def _rest(self, answer: Answer) -> None:
        message = answer.message
        delta = _delta(
            *self._deltas[answer.reply.index].rest(
                message.get("reasoning_content") or "", message["content"] or ""
            )
        )
        if "tool_calls" in message:
            calls = enumerate(message["tool_calls"])
            delta["tool_calls"] = [{"index": i, **call} for i, call in calls]
        if delta:
            await self._send(answer.reply, delta)

    def _read(self, ids: Sequence[int]) -> tuple[str, str]:
        """A half-made reply as (reasoning, content)."""
        parsed = self._serving.codec.parse(
            token_ids(ids), self._chat.turn.prompt_ids, self._chat.use.tools
        )
        return parsed.reasoning or "", parsed.content

    def _usage(self) -> dict[str, Any]:
        return usage(self._replies, [self._chat.turn.prompt_ids])

    async def _send(
        self, reply: Reply, delta: dict[str, Any], ending: Mapping[str, Any] | None = None
    ) -> None:
        if reply.index not in self._begun:
            self._begun.add(reply.index)
            delta = {"role": "assistant", "content": "", **delta}
        told, self._told[reply.index] = self._told[reply.index], len(reply.ids)
        choice: dict[str, Any] = {
            "index": reply.index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
            **(ending or {}),
        }
        if self._chat.request.logprobs and told < len(reply.ids):
            choice["logprobs"] = _logprobs(self._serving.codec, reply, told)
        if self._chat.request.return_token_ids:
            choice["token_ids"] = reply.ids[told:]
        more = {"usage": self._usage()} if self._chat.request.continuous_usage else {}
        await self._emit([choice], **more)

    async def _emit(self, choices: list[dict[str, Any]], **more: Any) -> None:
        head = self._serving.envelope("chat.completion.chunk", _response_id(self._replies[0]))
        if self._chat.request.return_token_ids and not self._events.started:
            head["prompt_token_ids"] = self._chat.turn.prompt_ids.tolist()
        await self._events.send({**head, "choices": choices, **more})


def _delta(reasoning: str, content: str) -> dict[str, Any]:
    parts = {"reasoning_content": reasoning, "content": content}
    return {name: text for name, text in parts.items() if text}


def _response_id(reply: Reply) -> str:
    """The id of the answer's first call, so that a log line leads to the record."""
    return f"chatcmpl-{reply.call_id}"
