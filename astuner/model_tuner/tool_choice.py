"""`tool_choice` and `parallel_tool_calls` without constrained decoding.

"none" hides the tools from the model (and so starts a new timeline where earlier
prompts showed them). "required", a named function and
`parallel_tool_calls: false` cannot be enforced on an engine that samples freely,
and refusing them would stop frameworks that always ask: the model is asked as
with "auto", its reply is returned as it is, and one that does not do what was
asked is counted as `tool_choice_unmet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from astuner.chat.protocol import Tool
from astuner.errors import RequestError
from astuner.model_tuner.wire import ChatRequest


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools the model sees, and what the client wants done with them."""

    tools: tuple[Tool, ...] = ()
    required: bool = False
    name: str | None = None
    only_one: bool = False

    def met_by(self, tool_calls: Sequence[Mapping[str, Any]]) -> bool:
        names = [call["function"]["name"] for call in tool_calls]
        if self.only_one and len(names) > 1:
            return False
        if self.name is not None:
            return self.name in names
        return bool(names) or not self.required


def tool_use(request: ChatRequest) -> ToolUse:
    """What the request says about tools. Raises RequestError."""
    tools = tuple(_checked(tool, i) for i, tool in enumerate(request.tools or ()))
    choice = request.tool_choice
    only_one = request.parallel_tool_calls is False
    if choice == "none":
        return ToolUse()
    if choice in (None, "auto"):
        return ToolUse(tools, only_one=only_one)
    if not tools:
        raise _invalid(f"{choice!r} needs `tools`", "tool_choice")
    if choice == "required":
        return ToolUse(tools, required=True, only_one=only_one)
    return ToolUse(tools, name=_named(choice, tools), only_one=only_one)


def _named(choice: str | dict[str, Any], tools: Sequence[Tool]) -> str:
    function: Any = choice.get("function") if isinstance(choice, dict) else None
    name = cast("dict[str, Any]", function).get("name") if isinstance(function, dict) else None
    if name is None:
        raise _invalid(
            f'{choice!r} is not "none", "auto", "required" or '
            '{"type": "function", "function": {"name": ...}}',
            "tool_choice",
        )
    known = [tool["function"]["name"] for tool in tools]
    if name not in known:
        raise _invalid(f"names {name!r}, but `tools` has {known}", "tool_choice")
    return name


def _checked(tool: dict[str, Any], index: int) -> Tool:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        raise _invalid('must be {"type": "function", "function": {...}}', f"tools[{index}]")
    if not isinstance(cast("dict[str, Any]", function).get("name"), str):
        raise _invalid("has no name", f"tools[{index}].function")
    return tool


def _invalid(problem: str, param: str) -> RequestError:
    return RequestError(f"{param} {problem}.", code="invalid_value", param=param)
