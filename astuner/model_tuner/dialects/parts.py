"""A chat answer as the parts that other dialects make items or blocks of.

Reasoning, text and each tool call is a part; a part opens, grows and closes. A whole
message is fed as one delta, so that streamed and whole answers cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["reasoning", "text", "tool"]


@dataclass(slots=True)
class Part:
    kind: Kind
    index: int
    """Its place in the answer."""
    text: str = ""
    """What there is so far; a tool call's arguments."""
    call_id: str = ""
    name: str = ""
    """Of the tool."""
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a part."""

    what: Literal["open", "grow", "close"]
    part: Part
    text: str = ""
    """What it grew by."""


class Parts:
    """The parts of one answer as it comes."""

    def __init__(self, *, reasoning: bool = True) -> None:
        """Without `reasoning` it is left out."""
        self.parts: list[Part] = []
        self._reasoning = reasoning
        self._open: tuple[Kind, int] | None = None

    def feed(self, delta: Mapping[str, Any]) -> Iterator[Change]:
        """Take a chat delta, or a whole chat message."""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        # White space that turns out to end the reasoning may come when the text has begun.
        late = self.parts and self.parts[-1].kind != "reasoning" and not reasoning.strip()
        if reasoning and self._reasoning and not late:
            yield from self._grow(("reasoning", 0), reasoning)
        if delta.get("content"):
            yield from self._grow(("text", 0), delta["content"])
        for place, call in enumerate(delta.get("tool_calls") or ()):
            function = call.get("function") or {}
            key: tuple[Kind, int] = ("tool", call.get("index", place))
            named = call.get("id") or "", function.get("name") or ""
            yield from self._grow(key, function.get("arguments") or "", *named)

    def end(self, *, complete: bool) -> Iterator[Change]:
        """The answer is over; where it says nothing, there is an empty text."""
        if not any(part.kind != "reasoning" for part in self.parts):
            yield from self._grow(("text", 0), "")
        yield from self._close("completed" if complete else "incomplete")

    def message(self) -> dict[str, Any]:
        """What the parts amount to, as a chat message."""
        content, reasoning = (
            "".join(part.text for part in self.parts if part.kind == kind)
            for kind in ("text", "reasoning")
        )
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = [called(p.call_id, p.name, p.text) for p in self.parts if p.kind == "tool"]
        return {**message, "tool_calls": calls} if calls else message

    def _grow(
        self, key: tuple[Kind, int], text: str, call_id: str = "", name: str = ""
    ) -> Iterator[Change]:
        if self._open != key:
            yield from self._close("completed")
            self._open = key
            self.parts.append(Part(key[0], len(self.parts), call_id=call_id, name=name))
            yield Change("open", self.parts[-1])
        part = self.parts[-1]
        part.text += text
        if text:
            yield Change("grow", part, text)

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[Change]:
        if self._open is not None:
            self._open = None
            self.parts[-1].status = status
            yield Change("close", self.parts[-1])


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call in chat form."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
