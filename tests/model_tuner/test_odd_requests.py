"""Whatever stands in whatever place of a request: an answer or a 4xx, never a bug of ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from astuner.model_tuner.in_process import InProcessTransport

from .tuner_world import TOOLS, Make

FUNCTION = {"name": "add", "parameters": {"type": "object"}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ],
    "tools": TOOLS,
    "tool_choice": {"type": "function", "function": {"name": "add"}},
    "stop": ["x"],
    "max_tokens": 3,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
    "logit_bias": {},
    "metadata": {"a": "b"},
}
RESPONSES: dict[str, Any] = {
    "model": "m",
    "instructions": "s",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}], "summary": []},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "2"},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "name": "add"},
    "text": {"format": {"type": "text"}},
    "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "max_output_tokens": 3,
    "metadata": {},
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 3,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "1", "name": "add", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "content": [{"type": "text", "text": "2"}],
                }
            ],
        },
    ],
    "tools": [{"name": "add", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "add"},
    "thinking": {"type": "disabled"},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u"},
}
ODD: list[Any] = [None, True, 0, -1, 1e300, "", "odd", [], [[]], ["odd"], [None], {}, {"type": []}]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside."""
    inner = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def with_odd(request: dict[str, Any], path: tuple[Any, ...], odd: Any) -> dict[str, Any]:
    changed = copy.deepcopy(request)
    at: Any = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = odd
    return changed


@pytest.mark.parametrize("counted", [False, True], ids=["asked", "counted"])
@pytest.mark.parametrize(
    ("path", "request_"),
    [("chat/completions", CHAT), ("responses", RESPONSES), ("messages", MESSAGES)],
    ids=["chat", "responses", "messages"],
)
async def test_every_odd_value_in_every_place(
    make: Make, path: str, request_: dict[str, Any], counted: bool
) -> None:
    if counted:
        path = {"responses": "responses/input_tokens", "messages": "messages/count_tokens"}.get(
            path, path
        )
    world = make("ok", max_context=100_000, chunk_tokens=100)
    key = world.session().agent("default", "default").api_key
    transport: Any = InProcessTransport(world.server.app)
    headers = {"x-api-key": key}
    async with httpx.AsyncClient(transport=transport, base_url="http://x/v1/") as client:

        async def ask(body: Any) -> httpx.Response:
            return await client.post(path, content=json.dumps(body), headers=headers)

        assert (await ask(request_)).status_code == 200
        bugs = [
            (place, odd, answer.text)
            for place in places(request_)
            for odd in ODD
            if (answer := await ask(with_odd(request_, place, odd))).status_code >= 500
        ]
    assert bugs == []
