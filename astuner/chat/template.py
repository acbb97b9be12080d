"""A tokenizer's own chat template, and what probing it tells.

Renders to text only. Bends normalised messages into the shape this template wants
(found by trying): arguments of tool calls as objects or as text, and `developer` as
`system` where the template does not know it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from astuner.chat.messages import parse_arguments
from astuner.chat.protocol import Message, Tool
from astuner.chat.tokens import Tokens
from astuner.errors import ModelError, RequestError

MARK, MARK2, MARK3, QUESTION = "qzMarkAqz", "qzMarkBqz", "qzMarkCqz", "qzMarkDqz"
"""Text no one writes, to find a message's place in what is rendered."""
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": MARK,
        "description": "",
        "parameters": {"type": "object", "properties": {MARK2: {"type": "string"}}},
    },
}
_USER: Message = {"role": "user", "content": QUESTION}


def called(name: str, call_id: str = "abcdefgh1") -> dict[str, Any]:
    """A probe: a call of `name` whose only argument is MARK2 = MARK3."""
    function = {"name": name, "arguments": f'{{"{MARK2}": "{MARK3}"}}'}
    return {"id": call_id, "type": "function", "function": function}


class ChatTemplate:
    """Raises ModelError where the tokenizer has no template or ignores a keyword."""

    def __init__(self, tokens: Tokens, kwargs: Mapping[str, Any], model_name: str) -> None:
        self._tokenizer = tokens.tokenizer
        self._kwargs = dict(kwargs)
        self._name = model_name or str(tokens.tokenizer.name_or_path) or "this model"
        self.source = self._read_source()
        for key in self._kwargs:
            if not re.search(rf"\b{re.escape(key)}\b", self.source):
                raise ModelError(
                    f"model.template_kwargs.{key} is set, but the chat template of {self._name} "
                    "does not use it. Remove it, or check its spelling against the template."
                )
        self._knows_developer = "developer" in self.source
        self._bend: _Bend = _plain
        self.supports_tools = self._shows([_USER], [_TOOL], MARK)
        self.shows_tool_calls = self._find_bend()
        self.turn_end = self._find_turn_end(tokens.added)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool], *, reply: bool) -> str:
        """The text of the messages, and with `reply` the opening of the next assistant turn.

        RequestError (400) where the template refuses them.
        """
        try:
            return self._tokenizer.apply_chat_template(
                [self._bent(m) for m in messages],
                tools=[dict(t) for t in tools] or None,
                tokenize=False,
                add_generation_prompt=reply,
                **self._kwargs,
            )
        except _REFUSALS as error:
            raise RequestError(
                f"The chat template of {self._name} refuses these messages: {error}",
                code="invalid_messages",
                param="messages",
            ) from error

    def check(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """RequestError (400) for what the template would silently leave out."""
        if tools and not self.supports_tools:
            raise RequestError(
                f"The chat template of {self._name} has no place for tools. Send the request "
                "without `tools` and describe them in a message, or choose a model whose "
                "template has a tool section.",
                code="tools_not_supported",
                param="tools",
            )
        if not self.shows_tool_calls and any(m.get("tool_calls") for m in messages):
            raise RequestError(
                f"The chat template of {self._name} cannot show the tool calls of an assistant "
                "message. Put them into its text.",
                code="tools_not_supported",
                param="messages",
            )

    def _read_source(self) -> str:
        # Some tokenizers hold several templates, of which this is the one used by default.
        try:
            source = self._tokenizer.get_chat_template()
        except ValueError:
            source = ""
        if not source:
            raise ModelError(
                f"The tokenizer of {self._name} has no chat template. Use an instruction-tuned "
                "model, or name a chat format that fits it in model.renderer, e.g. qwen3."
            )
        return source

    def _bent(self, message: Message) -> dict[str, Any]:
        bent = self._bend(message) if message.get("tool_calls") else dict(message)
        if bent["role"] == "developer" and not self._knows_developer:
            bent["role"] = "system"
        return bent

    def _try(self, messages: Sequence[Message], tools: Sequence[Tool], *, reply: bool) -> str:
        try:
            return self.render(messages, tools, reply=reply)
        except RequestError:
            return ""

    def _shows(self, messages: Sequence[Message], tools: Sequence[Tool], mark: str) -> bool:
        return mark in self._try(messages, tools, reply=True)

    def _find_bend(self) -> bool:
        """The first shape in which a tool call comes out whole: its argument quoted once
        (not as an escaped string, not as a Python dict) and no None."""
        call = {"role": "assistant", "content": "", "tool_calls": [called(MARK)]}
        result = {"role": "tool", "content": "1", "tool_call_id": "abcdefgh1"}
        tools = [_TOOL] if self.supports_tools else []
        for bend in (_as_objects, _plain):
            self._bend = bend
            text = self._try([_USER, call, result], tools, reply=True)
            shown = text.rpartition(QUESTION)[2]
            odd = (f'\\"{MARK2}', f"'{MARK2}'", "None")
            if MARK in shown and MARK3 in shown and not any(o in shown for o in odd):
                return True
        self._bend = _plain
        return False

    def _find_turn_end(self, added: Mapping[str, int]) -> str | None:
        """The token that closes an assistant's turn: it follows the text directly, and
        something (the next turn's opening) stands between it and the next text."""
        answer = {"role": "assistant", "content": MARK}
        question = {"role": "user", "content": MARK2}
        text = self._try([_USER, answer, question], (), reply=False)
        tail = text.partition(MARK)[2].partition(MARK2)[0].lstrip()
        ends = sorted((t for t in added if tail.startswith(t)), key=len, reverse=True)
        if not ends or not tail.removeprefix(ends[0]).strip():
            return None
        return ends[0]


_Bend = Callable[[Message], dict[str, Any]]


def _plain(message: Message) -> dict[str, Any]:
    return dict(message)


def _as_objects(message: Message) -> dict[str, Any]:
    calls = [
        {**call, "function": {**f, "arguments": parse_arguments(f["arguments"])}}
        for call in message["tool_calls"]
        for f in [call["function"]]
    ]
    return {**message, "tool_calls": calls}
