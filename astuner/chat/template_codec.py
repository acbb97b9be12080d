"""The verified bridge: any chat template as a ChatCodec.

`extend` never trusts a template. It renders the history with a marker in place of the
reply, with and without the new messages; only if the old text is a strict prefix, the
marker's turn is closed by the known end token, and the true reply renders the same way,
is the text after that token the delta. The delta is tokenized together with the end
token, which is a token of its own, so that no byte pair can merge across the seam.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from astuner.chat.protocol import Message, ParsedReply, Tool
from astuner.chat.renders import remembering
from astuner.chat.reply import (
    END_THINK,
    THINK,
    cut_at_stop,
    opens_reasoning,
    split_reasoning,
    structured,
)
from astuner.chat.template import MARK, MARK2, MARK3, ChatTemplate, called
from astuner.chat.tokens import Tokens
from astuner.chat.tool_formats import FoundCall, detect_format
from astuner.errors import RequestError
from astuner.types import TokenIds, token_ids

_log = logging.getLogger(__name__)


class TemplateCodec:
    """Implements `ChatCodec` with `tokenizer.apply_chat_template`."""

    def __init__(
        self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, model_name: str = ""
    ) -> None:
        self._tokens = Tokens(tokenizer)
        self._template = ChatTemplate(self._tokens, template_kwargs or {}, model_name)
        self._name = model_name or str(tokenizer.name_or_path) or "this model"
        self._end = self._template.turn_end
        if self._end is None:
            _log.warning(
                "The chat template of %s closes a reply with no token of its own, so no prompt "
                "can extend the one before: every turn will be a timeline of its own.",
                self._name,
            )
        end = (self._tokens.added[self._end],) if self._end is not None else ()
        self.stop_token_ids = tuple(dict.fromkeys((*end, *self._tokens.eos_ids())))
        self._remembered = remembering(self._render)
        self._thinks = END_THINK in self._template.source
        self._format = detect_format(self._template.source, self._tokens)
        self.supports_tools = self._template.supports_tools and self._format is not None

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        return self._remembered(messages, tools)

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        self._template.check(messages, tools)
        if tools and self._format is None:
            raise RequestError(
                f"The chat template of {self._name} has a tool section, but in a format whose "
                "calls cannot be read back. Send the request without `tools`, or set "
                "model.renderer to the family of this model.",
                code="tools_not_supported",
                param="tools",
            )
        return self._tokens.encode(self._template.render(messages, tools, reply=True))

    def extend(
        self,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
    ) -> TokenIds | None:
        close = self._close(completion_ids)
        extendable = history and history[-1]["role"] == "assistant" and new_messages
        if close is None or not extendable or any(m["role"] == "assistant" for m in new_messages):
            return None
        try:
            self._template.check([*history, *new_messages], tools)
            thought = self._thought(completion_ids, prompt_ids)
            delta = None if thought is None else self._delta(history, new_messages, tools, thought)
        except RequestError:  # the full render will say why
            return None
        return None if delta is None else np.concatenate([prompt_ids, completion_ids, close, delta])

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        ids = cut_at_stop(completion_ids, self.stop_token_ids)
        opened = self._thinks and opens_reasoning(prompt_ids, self._tokens)
        split = split_reasoning(ids, opened, self._tokens) if self._thinks else None
        reasoning, carry, ids = split or (None, "", ids)
        calls: list[FoundCall] = []
        if tools and self._format is not None:
            text, calls = self._format.find(ids)
        else:
            text = self._tokens.decode(ids)
        content = (carry + text).strip() if split or calls else text
        return structured(content, reasoning, calls, prompt_ids, completion_ids)

    def encode(self, text: str) -> TokenIds:
        return self._tokens.encode(text)

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        return self._tokens.decode(ids, skip_special=skip_special)

    def _close(self, completion_ids: TokenIds) -> TokenIds | None:
        """What is missing to end the reply's turn: nothing, or the end token when the reply
        was cut short. None where it ended in some other way than the template writes."""
        if self._end is None or np.isin(completion_ids[:-1], self.stop_token_ids).any():
            return None
        end = self._tokens.added[self._end]
        if len(completion_ids) and completion_ids[-1] == end:
            return token_ids([])
        ended = len(completion_ids) and int(completion_ids[-1]) in self.stop_token_ids
        return None if ended else token_ids([end])

    def _thought(self, completion_ids: TokenIds, prompt_ids: TokenIds) -> bool | None:
        """Whether the sampled text holds a closed `<think>`; None when it is still open."""
        if not self._thinks:
            return False
        text = self._tokens.decode(completion_ids, skip_special=False)
        opened = opens_reasoning(prompt_ids, self._tokens) or text.lstrip().startswith(THINK)
        return None if opened and END_THINK not in text else END_THINK in text

    def _delta(
        self,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[Tool],
        thought: bool,
    ) -> TokenIds | None:
        """Ids from after the end token of the reply to the opening of the next turn."""
        *before, reply = history
        old = self._template.render(before, tools, reply=True)
        marked = self._template.render(
            [*before, _marked(reply, thought), *new_messages], tools, reply=True
        )
        if not marked.startswith(old):
            return None
        delta = self._after_marks(marked[len(old) :], reply, thought)
        true = self._template.render([*before, reply, *new_messages], tools, reply=True)
        if delta is None or not self._same_turn(true, old, delta, reply, thought):
            return None
        ids = self._tokens.encode(f"{self._end}{delta}")
        return ids[1:] if ids[0] == self._tokens.added[self._end or ""] else None

    def _after_marks(self, text: str, reply: Message, thought: bool) -> str | None:
        """What follows the turn of the marked reply, if nothing is in it but the marks and
        the template's way to write reasoning and tool calls."""
        calls = reply.get("tool_calls", ())
        marks = [MARK] * thought + [MARK2] * bool(reply["content"] or not calls)
        place = 0
        for mark in marks:
            found = text.find(mark, place)
            glue = text[place:found].replace(THINK, "").replace(END_THINK, "")
            if found < 0 or glue.strip():
                return None
            place = found + len(mark)
        for _ in calls:
            found = text.find(MARK3, place)
            if found < 0:
                return None
            place = found + len(MARK3)
        before, end, after = text[place:].partition(self._end or "")
        return after if end and (calls or not before.strip()) else None

    def _same_turn(self, true: str, old: str, delta: str, reply: Message, thought: bool) -> bool:
        """Whether the true reply is rendered in the marked one's place, and in full."""
        tail = f"{self._end}{delta}"
        turn = true[len(old) : len(true) - len(tail)]
        return (
            true.startswith(old)
            and true.endswith(tail)
            and len(old) + len(tail) <= len(true)
            and reply["content"].strip() in turn
            and reply.get("reasoning_content", "").strip() in turn
            and (END_THINK in turn) == (thought or END_THINK in reply["content"])
        )


def _marked(reply: Message, thought: bool) -> dict[str, Any]:
    """The reply with marks in place of all that was sampled freely."""
    calls = reply.get("tool_calls", ())
    marked: dict[str, Any] = {"role": "assistant", "content": ""}
    if reply["content"] or not calls:
        marked["content"] = MARK2
    if thought:
        marked["reasoning_content"] = MARK
    if calls:
        marked["tool_calls"] = [called(c["function"]["name"], c["id"]) for c in calls]
    return marked
