"""What a client of OpenAI's Responses API asks, as a chat request.

Input items become messages: what one answer consisted of (reasoning, a message, function
calls) becomes one assistant message again. Tools that OpenAI runs itself, content that is
not text and constrained formats are refused. Looks up no stored responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field

from astuner.model_tuner.dialects.parts import called
from astuner.model_tuner.dialects.text_parts import fields_of, refuse, string, text_parts
from astuner.model_tuner.wire import Asked

ROLES = ("system", "developer", "user", "assistant")
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
THOUGHT = "reasoning_content"
LOGPROBS = "message.output_text.logprobs"


HARMLESS = frozenset(
    {
        "user",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "max_tool_calls",  # of OpenAI's own tools, which there are none of
        "stream_options",  # obfuscation, which there is none of
        "client_metadata",
    }
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "context_management": ([],),
    "modalities": (["text"],),
}
WAY_OUT = {
    "background": "Ask without it, and stream the answer if it takes long.",
    "conversation": "Use previous_response_id, or send the whole input.",
    "prompt": "Stored prompts are OpenAI's own: send instructions and input.",
    "truncation": "Nothing is dropped silently: shorten the input, or raise the limit.",
    "context_management": "Shorten the input in the agent.",
}


class ResponsesRequest(Asked):
    """POST /v1/responses."""

    harmless = HARMLESS
    neutral = NEUTRAL
    way_out = WAY_OUT

    input: str | list[Any] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] = Field([])
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    reasoning: dict[str, Any] = Field({})
    text: dict[str, Any] = Field({})
    include: list[str] = Field([])
    metadata: dict[str, Any] = Field({})
    store: bool = True
    stream: bool = False

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in self.include or self.top_logprobs > 0


def chat_body(request: ResponsesRequest, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The chat request with these messages. Raises RequestError."""
    _check_formats(request)
    first = [{"role": "system", "content": request.instructions}] if request.instructions else []
    body: dict[str, Any] = {"model": request.model, "messages": [*first, *messages]}
    if request.tools:
        body["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
        body["tool_choice"] = _tool_choice(request.tool_choice)
        body["parallel_tool_calls"] = request.parallel_tool_calls
    elif request.tool_choice not in ("auto", "none"):
        refuse("tool_choice", f"{request.tool_choice!r} needs `tools`")
    asked = {
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "logprobs": request.logprobs or None,
        "top_logprobs": request.top_logprobs or None,
    }
    body |= {name: value for name, value in asked.items() if value is not None}
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def messages_of(items: str | Sequence[object]) -> list[dict[str, Any]]:
    """Input as chat messages. Raises RequestError."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        fields = fields_of(item, where)
        last = messages[-1] if messages else {}
        match fields.get("type", "message"):
            case "message":
                message = _message(fields, where)
                if message["role"] == "assistant" and _is_thought(last):
                    last["content"] = message["content"]
                else:
                    messages.append(message)
            case "reasoning":
                messages.append(
                    {"role": "assistant", "content": "", THOUGHT: _thought(fields, where)}
                )
            case "function_call":
                if last.get("role") != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(_function_call(fields, where))
            case "function_call_output":
                messages.append(_tool_result(fields, where))
            case kind:
                problem = f"has type {kind!r}, which this model cannot be asked"
                refuse(where, problem, "unsupported_item")
    return messages


def _is_thought(message: Mapping[str, Any]) -> bool:
    """Whether the message is reasoning so far, and nothing else."""
    return THOUGHT in message and not message["content"] and "tool_calls" not in message


def _message(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = fields.get("role")
    if role not in ROLES:
        refuse(f"{where}.role", f"is {role!r}, but must be one of {', '.join(ROLES)}")
    return {"role": role, "content": text_parts(fields.get("content"), TEXTS, f"{where}.content")}


def _thought(fields: Mapping[str, Any], where: str) -> str:
    """The text of a reasoning item; "" where only OpenAI could read it."""
    content: object = fields.get("content") or []
    if not isinstance(content, list):
        refuse(f"{where}.content", f"must be a list of parts, not {type(content).__name__}")
    given = enumerate(cast("list[object]", content))
    parts = [(fields_of(part, f"{where}.content[{i}]"), i) for i, part in given]
    return "".join(
        string(part, "text", f"{where}.content[{i}]")
        for part, i in parts
        if part.get("type") == "reasoning_text"
    )


def _function_call(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id, name, arguments = (string(fields, n, where) for n in ("call_id", "name", "arguments"))
    return called(call_id, name, arguments)


def _tool_result(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    output = text_parts(fields.get("output"), TEXTS, f"{where}.output")
    call_id = string(fields, "call_id", where)
    return {"role": "tool", "tool_call_id": call_id, "content": output}


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A function tool as chat has it. `strict` asks for constrained decoding, which there is
    none of, and is no part of what the model reads."""
    kind = tool.get("type")
    if kind != "function":
        refuse(
            where,
            f"is {kind!r}, which only OpenAI can run. Offer a function tool that your agent runs",
            "unsupported_tool",
        )
    function = {"name": string(tool, "name", where)}
    function |= {n: tool[n] for n in ("description", "parameters") if tool.get(n) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            refuse("tool_choice", f'{choice!r} is not "none", "auto", "required" or a function')
        return choice
    if choice.get("type") != "function":
        refuse("tool_choice", f"has type {choice.get('type')!r}, but only functions can be chosen")
    return {"type": "function", "function": {"name": string(choice, "name", "tool_choice")}}


def _check_formats(request: ResponsesRequest) -> None:
    """Refuse what would change the answer and cannot be had."""
    kind = fields_of(request.text.get("format") or {}, "text.format").get("type", "text")
    if kind != "text":
        refuse(
            "text.format",
            f"{kind!r} cannot be honoured, because decoding is not constrained: ask for JSON "
            "in the instructions, or use tools",
            "unsupported_parameter",
        )
    if request.text.get("verbosity") not in (None, "medium"):
        refuse(
            "text.verbosity", "cannot be honoured: ask in the instructions", "unsupported_parameter"
        )
    if request.reasoning.get("effort") is not None:
        refuse(
            "reasoning.effort",
            "cannot be honoured: set model.template_kwargs in the configuration",
            "unsupported_parameter",
        )
