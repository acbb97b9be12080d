"""What a client of Anthropic's Messages API asks, as a chat request.

Content blocks become messages: tool results are messages of their own, a turn of the
assistant is one message with its text, thinking and tool calls. Tools whose schema is
Anthropic's, content that is not text and a prefilled answer are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field

from astuner.chat.messages import dump_arguments
from astuner.model_tuner.dialects.parts import called
from astuner.model_tuner.dialects.text_parts import (
    fields_of,
    refuse,
    string,
    text_part,
    text_parts,
)
from astuner.model_tuner.wire import Asked, StopString

TEXT = {"text": "text"}
RAW = "_raw_arguments"
"""Where arguments that are no JSON object are put, as `input` must be one."""


HARMLESS = frozenset(
    {"metadata", "service_tier", "cache_control", "inference_geo", "user_profile_id"}
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "speed": ("standard",),
    "output_config": ({},),
    "mcp_servers": ([],),
    "context_management": ({}, {"edits": []}),
}
WAY_OUT = {
    "container": "Run code in the agent, or in an environment of the run.",
    "mcp_servers": "Call MCP servers from the agent, and offer their tools in `tools`.",
    "output_config": "Decoding is not constrained: ask in the prompt, or use tools; effort is "
    "set by model.template_kwargs in the configuration.",
    "output_format": "Decoding is not constrained: ask for JSON in the prompt, or use tools.",
    "context_management": "Edit the messages in the agent.",
}


class MessagesRequest(Asked):
    """POST /v1/messages and /v1/messages/count_tokens."""

    harmless = HARMLESS
    neutral = NEUTRAL
    way_out = WAY_OUT

    messages: list[Any]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    system: str | list[Any] = ""
    tools: list[dict[str, Any]] = Field([])
    tool_choice: dict[str, Any] = Field({"type": "auto"})
    stop_sequences: list[StopString] = Field([], max_length=16)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    thinking: dict[str, Any] = Field({"type": "disabled"})
    stream: bool = False

    @property
    def shows_thinking(self) -> bool:
        """Thinking is shown to those who ask for it, as others may expect the first block to
        be text. How long the model thinks is its own affair."""
        shown = self.thinking.get("display") != "omitted"
        return self.thinking.get("type") in ("enabled", "adaptive", "between_tools") and shown


def chat_body(request: MessagesRequest) -> dict[str, Any]:
    """The chat request. Raises RequestError."""
    if request.thinking.get("type") not in ("enabled", "disabled", "adaptive", "between_tools"):
        refuse("thinking.type", f"is {request.thinking.get('type')!r}, which is not known")
    body: dict[str, Any] = {"model": request.model, "messages": _messages(request)}
    choice, only_one = _tool_choice(request)
    if request.tools:
        body["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
        body |= {"tool_choice": choice, "parallel_tool_calls": not only_one}
    asked = {
        "max_completion_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences or None,
    }
    body |= {name: value for name, value in asked.items() if value is not None}
    if request.stream:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body |= {"stream": True, "stream_options": options}
    return body


def arguments_of(tool_input: object) -> str:
    """A tool_use block's `input` as chat's arguments."""
    if isinstance(tool_input, dict):
        fields = cast("dict[str, object]", tool_input)
        raw = fields.get(RAW)
        if len(fields) == 1 and isinstance(raw, str):
            return raw
    return dump_arguments(tool_input)


def input_of(arguments: str) -> dict[str, Any]:
    """The other way round."""
    try:
        parsed: object = json.loads(arguments, parse_constant=_no_json)
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # or half a surrogate pair, which cannot be sent
        parsed = None
    return cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {RAW: arguments}


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _messages(request: MessagesRequest) -> list[dict[str, Any]]:
    system = text_parts(request.system, TEXT, "system")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]"
        messages += _turn(fields_of(message, where), where)
    if not request.messages:
        refuse("messages", "must have at least one message")
    if messages[-1]["role"] == "assistant":
        refuse(
            "messages",
            "ends with the assistant: the beginning of an answer cannot be put into the model's "
            "mouth, as it would be trained as if it were its own. End with a user message",
        )
    return messages


def _turn(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        refuse(f"{where}.role", f"is {role!r}, but must be user or assistant")
    where = f"{where}.content"
    if role == "assistant" and isinstance(content, list):
        return [_answer(cast("list[object]", content), where)]
    if role == "user" and isinstance(content, list):
        return _said(cast("list[object]", content), where)
    return [{"role": role, "content": text_parts(content, TEXT, where)}]


def _said(blocks: Sequence[object], where: str) -> list[dict[str, Any]]:
    """A user's blocks: each tool result a message, text between them one each."""
    messages: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        here = f"{where}[{i}]"
        fields = fields_of(block, here)
        if fields.get("type") == "tool_result":
            messages.append(_tool_result(fields, here))
            continue
        if not messages or messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": []})
        messages[-1]["content"].append(text_part(fields, TEXT, here))
    return messages or [{"role": "user", "content": ""}]


def _answer(blocks: Sequence[object], where: str) -> dict[str, Any]:
    """An assistant's blocks as one message."""
    message: dict[str, Any] = {"role": "assistant", "content": []}
    thoughts: list[str] = []
    for i, block in enumerate(blocks):
        here = f"{where}[{i}]"
        fields = fields_of(block, here)
        match fields.get("type"):
            case "tool_use":
                call_id, name = string(fields, "id", here), string(fields, "name", here)
                call = called(call_id, name, arguments_of(fields.get("input") or {}))
                message.setdefault("tool_calls", []).append(call)
            case "thinking":
                thoughts.append(string(fields, "thinking", here))
            case "redacted_thinking":  # nobody but Anthropic can read it
                pass
            case _:
                message["content"].append(text_part(fields, TEXT, here))
    return message | ({"reasoning_content": "\n".join(thoughts)} if any(thoughts) else {})


def _tool_result(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As a chat message, which knows no `is_error`: the text says so instead."""
    content = text_parts(fields.get("content"), TEXT, f"{where}.content")
    if fields.get("is_error") and not _first_text(content).lower().startswith("error"):
        content = f"Error: {content}" if isinstance(content, str) else _prefixed(content)
    call_id = string(fields, "tool_use_id", where)
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _first_text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else next((p["text"] for p in content), "")


def _prefixed(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": f"Error: {_first_text(parts)}"}, *map(dict, parts[1:])]


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type", "custom")
    if kind not in ("custom", None):
        refuse(
            where,
            f"is {kind!r}, whose schema only Anthropic's models know. Offer a tool with an "
            "input_schema",
            "unsupported_tool",
        )
    function = {"name": string(tool, "name", where)}
    function |= {"description": tool["description"]} if tool.get("description") else {}
    schema = fields_of(tool.get("input_schema"), f"{where}.input_schema")
    return {"type": "function", "function": {**function, "parameters": dict(schema)}}


def _tool_choice(request: MessagesRequest) -> tuple[str | dict[str, Any], bool]:
    """Chat's tool_choice, and whether one call at most is wanted."""
    choice = request.tool_choice
    kind = choice.get("type")
    only_one = bool(choice.get("disable_parallel_tool_use"))
    if kind in ("any", "tool") and not request.tools:
        refuse("tool_choice", f"{kind!r} needs `tools`")
    if kind == "tool":
        name = string(choice, "name", "tool_choice")
        return {"type": "function", "function": {"name": name}}, only_one
    known = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in known:
        refuse("tool_choice.type", f"is {kind!r}, but must be auto, any, tool or none")
    return known[kind], only_one
