"""OpenAI's Responses API: POST /v1/responses, and what was stored of the answers.

A response is stored for its session unless `store` is false: as JSON to be read again, and
as messages for requests that name it in `previous_response_id`. The events of a stream
are those OpenAI documents, in their order. See `responses_request` for what is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from astuner.errors import RequestError
from astuner.model_tuner.dialects.parts import Change, Part
from astuner.model_tuner.dialects.response_store import ResponseStore, Stored
from astuner.model_tuner.dialects.responses_request import (
    ResponsesRequest,
    chat_body,
    messages_of,
)
from astuner.model_tuner.dialects.translation import Dialect, Event, Translation
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.session import AgentKey, SessionBook
from astuner.model_tuner.wire import ErrorShape, error_json, parse_request

Json = dict[str, Any]


def _error_event(body: Json, sent: int) -> tuple[str, Json]:
    # The documented event has its fields outside, the SDK raises what is under "error".
    error = body["error"]
    fields = {name: error[name] for name in ("code", "message", "param")}
    return "error", {"type": "error", "sequence_number": sent, **fields, "error": error}


ERRORS = ErrorShape(body=error_json, event=_error_event)


class Responses(Dialect):
    """The dialect."""

    errors = ERRORS

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def translate(self, agent: AgentKey, data: Mapping[str, Any]) -> ResponsesTranslation:
        request = parse_request(ResponsesRequest, data)
        messages = [*self._before(agent, request), *messages_of(request.input)]
        if not messages or not request.input:
            raise RequestError("input must not be empty.", code="invalid_value", param="input")
        store = self._store if request.store else None
        return ResponsesTranslation(agent, request, messages, store)

    def _before(self, agent: AgentKey, request: ResponsesRequest) -> tuple[Json, ...]:
        response_id = request.previous_response_id
        if response_id is None:
            return ()
        stored = self._store.find(agent.session, response_id)
        if stored is None:
            raise RequestError(
                f"Previous response with id {response_id!r} not found. Only responses of the same "
                "episode that were asked for without store=false can be continued.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return stored.messages


class ResponsesTranslation(Translation):
    """One request and its answer."""

    def __init__(
        self,
        agent: AgentKey,
        request: ResponsesRequest,
        messages: list[Json],
        store: ResponseStore | None,
    ) -> None:
        super().__init__(chat_body(request, messages))
        self._agent = agent
        self._request = request
        self._messages = messages
        self._store = store
        self._created = int(time.time())
        self._sequence = 0
        self._told = 0
        """How many rows of logprobs the deltas have shown."""

    def whole(self) -> Json:
        response = self._response()
        response["output"] = [self._item(part) for part in self.parts.parts]
        response["completed_at"] = int(time.time()) if self.complete else None
        if not self.complete:
            reason = "max_output_tokens" if self.finish == "length" else self.finish
            response |= {"status": "incomplete", "incomplete_details": {"reason": reason}}
        else:
            response["status"] = "completed"
        response["usage"] = _usage(self.usage)
        if self._store is not None:
            kept = Stored(response, (*self._messages, self.parts.message()))
            self._store.put(self._agent.session, response["id"], kept)
        return response

    def begun(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response())

    def changed(self, change: Change) -> Iterator[Event]:
        part = change.part
        at = {"item_id": self._item_id(part), "output_index": part.index}
        if change.what == "open":
            item = self._item(part) | ({} if part.kind == "tool" else {"content": []})
            yield self._event("response.output_item.added", output_index=part.index, item=item)
        if part.kind == "tool":
            yield from self._arguments(change, at)
        else:
            yield from self._text(change, {**at, "content_index": 0})
        if change.what == "close":
            item = self._item(part)
            yield self._event("response.output_item.done", output_index=part.index, item=item)

    def ended(self) -> Iterator[Event]:
        kind = "response.completed" if self.complete else "response.incomplete"
        yield self._event(kind, response=self.whole())

    def _arguments(self, change: Change, at: Json) -> Iterator[Event]:
        kind, part = "response.function_call_arguments", change.part
        if change.what == "grow":
            yield self._event(f"{kind}.delta", **at, delta=change.text)
        elif change.what == "close":
            yield self._event(f"{kind}.done", **at, name=part.name, arguments=part.text)

    def _text(self, change: Change, at: Json) -> Iterator[Event]:
        part, thought = change.part, change.part.kind == "reasoning"
        kind = "response.reasoning_text" if thought else "response.output_text"
        if change.what == "open":
            yield self._event("response.content_part.added", **at, part=_content("", thought, []))
        elif change.what == "grow":
            new, self._told = self.logprobs[self._told :], len(self.logprobs)
            more = {} if thought else {"logprobs": _rows(new)}
            yield self._event(f"{kind}.delta", **at, delta=change.text, **more)
        else:
            content = _content(part.text, thought, self.logprobs)
            more = {} if thought else {"logprobs": content["logprobs"]}
            yield self._event(f"{kind}.done", **at, text=part.text, **more)
            yield self._event("response.content_part.done", **at, part=content)

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._sequence = self._sequence, self._sequence + 1
        return kind, {"type": kind, "sequence_number": number, **fields}

    def _item_id(self, part: Part) -> str:
        prefix = {"reasoning": "rs", "text": "msg", "tool": "fc"}[part.kind]
        return f"{prefix}_{self.id}_{part.index}"

    def _item(self, part: Part) -> Json:
        head: Json = {"id": self._item_id(part), "status": part.status}
        if part.kind == "tool":
            call = {"call_id": part.call_id, "name": part.name, "arguments": part.text}
            return {"type": "function_call", **head, **call}
        content = [_content(part.text, part.kind == "reasoning", self.logprobs)]
        if part.kind == "reasoning":
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}

    def _response(self) -> Json:
        """The response before there is any output."""
        request = self._request
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": request.store,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": request.tool_choice,
            "tools": request.tools,
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }


class StoredResponses(Endpoint):
    """GET and DELETE /v1/responses/ID."""

    errors = ERRORS

    def __init__(self, store: ResponseStore, sessions: SessionBook) -> None:
        super().__init__(sessions)
        self._store = store

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        response_id = exchange.path_params["response"]
        stored = self._store.find(agent.session, response_id)
        if stored is None:
            raise RequestError(
                f"Response with id {response_id!r} not found in this episode.",
                status=404,
                code="response_not_found",
                param="response_id",
            )
        if exchange.method == "DELETE":
            self._store.drop(agent.session, response_id)
            gone = {"id": response_id, "object": "response", "deleted": True}
            await exchange.reply(gone)
        else:
            await exchange.reply(stored.payload)


def _content(text: str, thought: bool, logprobs: Sequence[Json]) -> Json:
    if thought:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": _rows(logprobs)}


def _rows(logprobs: Sequence[Json]) -> list[Json]:
    """Chat's logprobs; this dialect has no way to say that a token's bytes are not known."""

    def known(row: Json) -> Json:
        return {**row, "bytes": row.get("bytes") or []}

    return [
        {**known(row), "top_logprobs": [known(top) for top in row.get("top_logprobs") or ()]}
        for row in logprobs
    ]


def _usage(chat: Mapping[str, Any]) -> Json | None:
    if not chat:
        return None
    cached = (chat.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (chat.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": chat["total_tokens"],
    }
