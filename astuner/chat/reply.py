"""Sampled ids, cut into reasoning, text and tool calls, as a structured reply.

What the two codecs share. Nothing is repaired: reasoning that was never closed leaves
no text, and a malformed tool call stays in the text.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

from astuner.chat.messages import dump_arguments
from astuner.chat.protocol import ParsedReply
from astuner.chat.tokens import Tokens
from astuner.chat.tool_formats import FoundCall
from astuner.types import TokenIds

THINK, END_THINK = "<think>", "</think>"
_OPENER_TOKENS = 16
"""More than `<think>` and a few line breaks ever take."""


def reply_message(reply: ParsedReply) -> dict[str, Any]:
    """The reply as an assistant message, normalised."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [dict(call) for call in reply.tool_calls]
    return message


def cut_at_stop(ids: TokenIds, stop_token_ids: Sequence[int]) -> TokenIds:
    """The ids before the first stop token."""
    stops = np.flatnonzero(np.isin(ids, stop_token_ids))
    return ids[: stops[0]] if len(stops) else ids


def opens_reasoning(prompt_ids: TokenIds, tokens: Tokens) -> bool:
    """Whether the prompt ends with an opened `<think>`."""
    tail = tokens.decode(prompt_ids[-_OPENER_TOKENS:], skip_special=False)
    return tail.rstrip().endswith(THINK)


def split_reasoning(
    ids: TokenIds, opened: bool, tokens: Tokens
) -> tuple[str | None, str, TokenIds] | None:
    """Reasoning, text that its last token shares with what follows, and the ids after it.

    None where there is no reasoning. Only reasoning at the very start counts.
    """
    text = tokens.decode(ids, skip_special=False)
    if not opened and not text.lstrip().startswith(THINK):
        return None
    reasoning, closed, _ = text.lstrip().removeprefix(THINK).partition(END_THINK)
    end = len(ids)
    if closed:
        end = bisect_left(
            range(len(ids) + 1),
            True,
            key=lambda n: END_THINK in tokens.decode(ids[:n], skip_special=False),
        )
    rest = tokens.decode(ids[:end], skip_special=False).partition(END_THINK)[2]
    return reasoning.strip() or None, rest, ids[end:]


def structured(
    content: str,
    reasoning: str | None,
    calls: Sequence[FoundCall],
    prompt_ids: TokenIds,
    completion_ids: TokenIds,
) -> ParsedReply:
    """Tool-call ids are nine letters and digits, as the strictest templates ask, and
    follow from the tokens: the same run makes the same ids."""
    seed = hashlib.blake2b(prompt_ids.tobytes() + b"|" + completion_ids.tobytes()).hexdigest()
    return ParsedReply(
        content,
        reasoning,
        tuple(
            {
                "id": call.call_id or hashlib.blake2b(f"{seed}{n}".encode()).hexdigest()[:9],
                "type": "function",
                "function": {
                    "name": call.name.encode(errors="replace").decode(),
                    "arguments": dump_arguments(call.arguments),
                },
            }
            for n, call in enumerate(calls)
        ),
    )
