"""What the rest of the house knows of a model family's chat format.

A `ChatCodec` turns messages and tools into prompt ids, extends earlier ids
verbatim by new messages, and parses sampled ids back into a message. Messages
are dicts in OpenAI's form, normalised by `chat.messages.normalise`. It never
samples and never sees HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from astuner.types import TokenIds

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
"""OpenAI form: {"type": "function", "function": {"name", "description", "parameters"}}."""


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A completion as a structured assistant message."""

    content: str
    reasoning: str | None
    tool_calls: tuple[Mapping[str, Any], ...]
    """OpenAI form with ids: {"id", "type": "function", "function": {"name", "arguments": str}}."""


class ChatCodec(Protocol):
    """Messages to tokens and back, for one tokenizer."""

    stop_token_ids: tuple[int, ...]
    """Tokens that end an assistant turn."""
    supports_tools: bool

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        """The full prompt [T], up to where the assistant starts to write.

        Raises RequestError for an unknown role, content the model cannot read (images,
        audio), or tools the template has no place for.
        """
        ...

    def extend(
        self,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
    ) -> TokenIds | None:
        """`prompt + completion + delta` [T], or None when that cannot be proven safe.

        `history` ends with the assistant message that `completion_ids` were parsed
        into; `new_messages` has no assistant message. The result starts with the
        given ids verbatim.
        """
        ...

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        """The sampled ids as a message. Malformed tool calls stay in the content."""
        ...

    def encode(self, text: str) -> TokenIds:
        """Plain text to ids [T], no template and no added special tokens."""
        ...

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        """Ids to text."""
        ...
