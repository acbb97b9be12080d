"""Random conversations, as hypothesis draws them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Does something.",
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
        },
    }
    for name in ("get_weather", "add")
]
WITH_TOOLS = {"qwen2.5", "qwen3", "qwen3-bridge", "llama-3", "llama-3-bridge"}
WITH_REASONING = {"qwen3", "qwen3-bridge"}

# Few pieces, chosen to merge with their neighbours and to look like markup.
_pieces = st.sampled_from(
    [
        "a",
        "The sum",
        " is 42",
        "\n",
        "\n\n",
        " ",
        "  ",
        "{",
        '"name"',
        "<",
        "think",
        "é",
        "你",
        "🙂",
        ".",
    ]
)
texts = st.lists(_pieces, max_size=6).map("".join)
words = st.lists(_pieces, min_size=1, max_size=4).map("".join).filter(str.strip)


@st.composite
def tool_calls(draw: st.DrawFn, most: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call0000{i}",
            "type": "function",
            "function": {
                "name": draw(st.sampled_from(["get_weather", "add"])),
                "arguments": json.dumps(
                    draw(st.dictionaries(st.sampled_from(["x", "y z"]), texts | st.integers())),
                    ensure_ascii=False,
                ),
            },
        }
        for i in range(draw(st.integers(1, most)))
    ]


@st.composite
def turns(draw: st.DrawFn, family: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Pairs of an assistant message and the messages that answer it."""
    made: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for _ in range(draw(st.integers(1, 3))):
        reply: dict[str, Any] = {"role": "assistant", "content": draw(words)}
        if family in WITH_REASONING and draw(st.booleans()):
            reply["reasoning_content"] = draw(words).strip()
        if family in WITH_TOOLS and draw(st.booleans()):
            one_only = family.startswith("llama-3")
            reply["tool_calls"] = draw(tool_calls(1 if one_only else 2))
            if one_only or draw(st.booleans()):
                reply["content"] = ""
            answer = [
                {"role": "tool", "content": draw(texts), "tool_call_id": c["id"]}
                for c in reply["tool_calls"]
            ]
        else:
            answer = [{"role": "user", "content": draw(words)}]
        made.append((reply, answer))
    return made


@st.composite
def openings(draw: st.DrawFn) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    return [*system, {"role": "user", "content": draw(words)}]
