"""One form for messages, and what it means for two of them to be the same.

`normalise` turns whatever clients send in OpenAI's shape into plain dicts of text, or
raises RequestError naming the message. `comparable` is the form in which a resent
history is recognised: blind to what frameworks add or reformat, never to text that the
model would see. Knows no template and no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, cast

from astuner.chat.protocol import Message
from astuner.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalise(messages: object) -> tuple[dict[str, Any], ...]:
    """Messages as dicts with `role` and `content` (str, "" for none) and, where given,
    `name`, `reasoning_content`, `tool_call_id` and `tool_calls` (arguments as a string).

    Text parts are joined by newlines. Everything else a client may send along
    (`refusal`, `audio`, `annotations`, ...) is dropped. Normalising twice changes nothing.
    Raises RequestError (400) for anything a text model cannot be asked.
    """
    if not isinstance(messages, list | tuple):
        _refuse("messages", f"must be a list of messages, not {type(messages).__name__}")
    if not messages:
        _refuse("messages", "must not be empty: send at least one message")
    return tuple(
        _message(m, f"messages[{i}]") for i, m in enumerate(cast("list[object]", messages))
    )


def comparable(message: Message) -> str:
    """Equal for two normalised messages that mean the same to the model.

    Tool-call arguments are compared as JSON. An assistant's `name` and its reasoning are
    left out: frameworks add the one and drop the other (for reasoning see `history`).
    """
    role = message["role"]
    name = None if role == "assistant" else message.get("name")
    calls = [
        [call["id"], call["function"]["name"], _comparable_json(call["function"]["arguments"])]
        for call in message.get("tool_calls", ())
    ]
    return json.dumps([role, message["content"], name, message.get("tool_call_id"), calls])


def parse_arguments(arguments: str) -> Any:
    """A tool call's arguments as JSON; the string itself where it is none."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def dump_arguments(arguments: Any) -> str:
    """A tool call's arguments as a string of JSON; a string is taken as it is."""
    if isinstance(arguments, str):
        return arguments or "{}"
    text = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    # Half a surrogate pair can be written in JSON, but not be sent as UTF-8.
    return text if _is_utf8(text) else json.dumps(arguments)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _comparable_json(arguments: str) -> list[Any]:
    parsed = parse_arguments(arguments)
    return [parsed is arguments, json.dumps(parsed, sort_keys=True)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        _refuse(where, f"must be an object, not {type(message).__name__}")
    given = cast("Mapping[str, Any]", message)
    role = given.get("role")
    if role not in ROLES:
        _refuse(f"{where}.role", f"is {role!r}, but must be one of {', '.join(ROLES)}")
    clean: dict[str, Any] = {"role": role, "content": _text(given.get("content"), where)}
    if isinstance(given.get("name"), str):
        clean["name"] = given["name"]
    if role == "tool" and given.get("tool_call_id") is not None:
        clean["tool_call_id"] = _string(given["tool_call_id"], f"{where}.tool_call_id")
    if role == "assistant":
        reasoning = given.get("reasoning_content") or given.get("reasoning")
        if isinstance(reasoning, str):
            clean["reasoning_content"] = reasoning
        if given.get("tool_calls"):
            clean["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    return clean


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        _refuse(f"{where}.content", f"must be text, not {type(content).__name__}")
    parts = enumerate(cast("list[object]", content))
    return "\n".join(_part(part, f"{where}.content[{i}]") for i, part in parts)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    given = cast("Mapping[str, Any]", part) if isinstance(part, Mapping) else {}
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        _refuse(where, f"has type {kind!r}, but the model reads text only")
    return _string(given.get(_TEXT_PARTS[kind]), f"{where}.{_TEXT_PARTS[kind]}")


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        _refuse(where, f"must be a list, not {type(calls).__name__}")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(cast("list[object]", calls))]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    given = cast("Mapping[str, Any]", call) if isinstance(call, Mapping) else {}
    function: object = given.get("function")
    if not isinstance(function, Mapping):
        _refuse(f"{where}.function", "is missing: only function tools can be called")
    fields = cast("Mapping[str, Any]", function)
    return {
        "id": _string(given.get("id", ""), f"{where}.id"),
        "type": "function",
        "function": {
            "name": _string(fields.get("name"), f"{where}.function.name"),
            "arguments": dump_arguments(fields.get("arguments")),
        },
    }


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"must be a string, not {type(value).__name__}")
    return value


def _refuse(where: str, problem: str) -> NoReturn:
    raise RequestError(f"{where} {problem}.", status=400, code="invalid_value", param=where)
