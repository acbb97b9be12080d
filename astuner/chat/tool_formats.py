"""How a chat template's model writes its tool calls.

The parsers are those of the `renderers` library, chosen by what the template's text
says; only Hermes-style calls whose tags are no tokens of the vocabulary are parsed here.
Malformed calls are never repaired: they stay in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from astuner.chat.messages import parse_arguments
from astuner.chat.tokens import Tokens
from astuner.types import TokenIds

TRIPS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)
"""What a parser may raise on sampled text, which can be anything at all."""


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A well-formed tool call. `arguments` is JSON, or text where the family writes text."""

    name: str
    arguments: Any
    call_id: str | None = None
    """Where the family samples ids of its own."""


class ToolFormat(Protocol):
    def find(self, ids: TokenIds) -> tuple[str, list[FoundCall]]:
        """The text around the well-formed calls, and the calls."""
        ...


def detect_format(template: str, tokens: Tokens) -> ToolFormat | None:
    """The format that a template with a tool section asks for; None where unknown."""
    if "<｜tool▁calls▁begin｜>" in template:  # noqa: RUF001
        return LibraryFormat("deepseek-v3", tokens)
    if "<tool_call>" in template and "<tool_call>" in tokens.added:
        by_mark = {"<function=": "qwen3.5", "<arg_key>": "glm"}
        name = next((n for mark, n in by_mark.items() if mark in template), "qwen3")
        return LibraryFormat(name, tokens)
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return HermesText(tokens)
    if "<|start_header_id|>" in template and '"parameters": ' in template:
        return Llama3Json(tokens)
    return None


def split_calls(
    ids: Sequence[int], attempts: Sequence[Any], tokens: Tokens
) -> tuple[str, list[FoundCall]]:
    """What the library's parsers found: well-formed calls, and the text without them."""
    keep = [True] * len(ids)
    calls: list[FoundCall] = []
    for attempt in attempts:
        if attempt.status in ("ok", "unknown_tool") and isinstance(attempt.name, str):
            calls.append(FoundCall(attempt.name, attempt.arguments, attempt.id))
            start, end = attempt.token_span or (0, 0)
            keep[start:end] = [False] * (end - start)
    text = tokens.decode([i for i, kept in zip(ids, keep, strict=True) if kept])
    return text, calls


class LibraryFormat:
    """One of the parsers of `renderers.parsers`, by name."""

    def __init__(self, name: str, tokens: Tokens) -> None:
        from renderers.parsers import get_tool_parser

        self._parser = get_tool_parser(name, tokens.tokenizer)
        self._tokens = tokens

    def find(self, ids: TokenIds) -> tuple[str, list[FoundCall]]:
        listed = ids.tolist()
        try:
            with self._tokens.lock:
                _, attempts = self._parser.extract(listed)
        except TRIPS:
            return self._tokens.decode(ids), []
        return split_calls(listed, attempts, self._tokens)


class Llama3Json:
    """The whole reply is one JSON object with a name and parameters."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def find(self, ids: TokenIds) -> tuple[str, list[FoundCall]]:
        text = self._tokens.decode(ids)
        call = parse_arguments(text.strip())
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            return "", [FoundCall(call["name"], call.get("parameters", call.get("arguments", {})))]
        return text, []


class HermesText:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, also with a list of calls."""

    _BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def find(self, ids: TokenIds) -> tuple[str, list[FoundCall]]:
        calls: list[FoundCall] = []

        def take(block: re.Match[str]) -> str:
            body = parse_arguments(block[1].strip())
            found = body if isinstance(body, list) else [body]
            if not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in found):
                return block[0]
            calls.extend(FoundCall(c["name"], c.get("arguments", {})) for c in found)
            return ""

        return self._BLOCK.sub(take, self._tokens.decode(ids)), calls
