"""A request's prompt: an extension of what was sampled before, or a fresh render.

The one place that decides between the two. Records nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from astuner.chat.history import History
from astuner.chat.protocol import ChatCodec, Message, Tool
from astuner.types import TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    ids: TokenIds
    parent_id: str | None
    """The call whose tokens `ids` starts with verbatim."""
    new_timeline_reason: str | None
    """None with a parent; else a reason of `History.why_new`, or "template_rewrites"."""


def build_prompt(
    codec: ChatCodec, history: History, messages: Sequence[Message], tools: Sequence[Tool] = ()
) -> Prompt:
    """The prompt for normalised messages. Raises RequestError (400) where the template
    cannot show them."""
    match = history.match(messages, tools)
    if match is None:
        return Prompt(codec.render(messages, tools), None, history.why_new(messages, tools))
    ids = codec.extend(
        match.prompt_ids, match.completion_ids, match.history, match.new_messages, tools
    )
    if ids is None:
        return Prompt(codec.render(messages, tools), None, "template_rewrites")
    return Prompt(ids, match.call_id, None)
