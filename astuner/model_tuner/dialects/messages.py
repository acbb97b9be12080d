"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

Answers have a block for each part, and the stream has Anthropic's events. `input_tokens`
does not count what came from the cache, as there. See `messages_request` for what is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from astuner.errors import RequestError
from astuner.model_tuner.dialects.messages_request import MessagesRequest, chat_body, input_of
from astuner.model_tuner.dialects.parts import Change, Part
from astuner.model_tuner.dialects.translation import Dialect, Event, Translation
from astuner.model_tuner.session import AgentKey
from astuner.model_tuner.wire import ErrorShape, parse_request

Json = dict[str, Any]

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


def error_body(message: str, status: int, code: str | None, param: str | None = None) -> Json:
    """Anthropic's error JSON; `code` and `param` are more than it has."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    error = {"type": kind, "message": message, "code": code, "param": param}
    return {"type": "error", "error": error}


ERRORS = ErrorShape(body=error_body, event=lambda body, _: ("error", body))


class Messages(Dialect):
    """The dialect."""

    errors = ERRORS

    def __init__(self, *, counting: bool = False) -> None:
        """`counting`: for a request that is only counted, which has no max_tokens."""
        self._counting = counting

    def translate(self, agent: AgentKey, data: Mapping[str, Any]) -> MessagesTranslation:
        request = parse_request(MessagesRequest, data)
        if request.max_tokens is None and not self._counting:
            raise RequestError(
                "max_tokens is missing: say how many tokens the answer may have.",
                code="missing_required_parameter",
                param="max_tokens",
            )
        return MessagesTranslation(chat_body(request), reasoning=request.shows_thinking)


class MessagesTranslation(Translation):
    """One request and its answer."""

    def whole(self) -> Json:
        blocks = [self._block(part) for part in self.parts.parts]
        return self._message(blocks) | self._ending() | {"usage": self._usage()}

    def begun(self) -> Iterator[Event]:
        yield _event("message_start", message={**self._message([]), "usage": self._usage()})

    def changed(self, change: Change) -> Iterator[Event]:
        part = change.part
        if change.what == "open":
            block = self._block(part) | ({"signature": ""} if part.kind == "reasoning" else {})
            yield _event("content_block_start", index=part.index, content_block=block)
        elif change.what == "grow" and part.kind != "tool":
            name = "thinking" if part.kind == "reasoning" else "text"
            yield _delta(part, {"type": f"{name}_delta", name: change.text})
        elif change.what == "close":
            yield from self._closed(part)

    def ended(self) -> Iterator[Event]:
        yield _event("message_delta", delta=self._ending(), usage=self._usage())
        yield _event("message_stop")

    def _closed(self, part: Part) -> Iterator[Event]:
        if part.kind == "tool":
            tool_input = json.dumps(input_of(part.text))
            yield _delta(part, {"type": "input_json_delta", "partial_json": tool_input})
        if part.kind == "reasoning":
            yield _delta(part, {"type": "signature_delta", "signature": self.id})
        yield _event("content_block_stop", index=part.index)

    def _block(self, part: Part) -> Json:
        match part.kind:
            case "reasoning":
                # Some frameworks send thinking back only if it is signed.
                return {"type": "thinking", "thinking": part.text, "signature": self.id}
            case "text":
                return {"type": "text", "text": part.text}
            case "tool":
                tool_input = {} if part.status == "in_progress" else input_of(part.text)
                head = {"type": "tool_use", "id": part.call_id, "name": part.name}
                return {**head, "input": tool_input}

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _ending(self) -> Json:
        at_stop = self.finish == "stop" and self.stop is not None
        reason = "stop_sequence" if at_stop else STOP_REASONS.get(self.finish, "end_turn")
        return {"stop_reason": reason, "stop_sequence": self.stop if at_stop else None}

    def _usage(self) -> Json:
        chat = self.usage
        cached = (chat.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return {
            "input_tokens": (chat.get("prompt_tokens") or 0) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": chat.get("completion_tokens") or 0,
        }


def _event(kind: str, **fields: Any) -> Event:
    return kind, {"type": kind, **fields}


def _delta(part: Part, delta: Json) -> Event:
    return _event("content_block_delta", index=part.index, delta=delta)
