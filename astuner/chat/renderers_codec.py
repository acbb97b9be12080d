"""Model families that the `renderers` library knows, as a ChatCodec.

The library renders, parses and extends; what is added is our error types, the promise
that an extension starts with the given ids verbatim, and one lock, because its
renderers use the tokenizer directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from astuner.chat.messages import parse_arguments
from astuner.chat.protocol import Message, ParsedReply, Tool
from astuner.chat.renders import remembering
from astuner.chat.reply import cut_at_stop, structured
from astuner.chat.tokens import Tokens
from astuner.chat.tool_formats import TRIPS, FoundCall
from astuner.errors import ModelError, RequestError
from astuner.types import TokenIds, token_ids

_KNOW_DEVELOPER = {"deepseek-v4", "gemma4", "gpt-oss"}
_WANT_TOOL_NAMES = {"gemma4", "gpt-oss", "inkling"}
"""Families whose tool messages show the function's name, which OpenAI's form leaves out."""


def make_renderer(
    tokenizer: Any, name: str, template_kwargs: Mapping[str, Any], **fields: Any
) -> Any:
    """A renderer of the library. ModelError for an unknown family, a keyword it does not
    take, or a tokenizer that lacks the family's special tokens."""
    from pydantic import TypeAdapter
    from renderers import RendererConfig, create_renderer
    from renderers.base import MODEL_RENDERER_MAP, template_field_names

    known = sorted(set(MODEL_RENDERER_MAP.values()))
    if name not in known:
        raise ModelError(
            f"model.renderer is {name!r}, but must be auto, template or one of: {', '.join(known)}."
        )
    config: Any = TypeAdapter[Any](RendererConfig).validate_python({"name": name, **fields})
    try:
        return create_renderer(tokenizer, config, chat_template_kwargs=dict(template_kwargs))
    except AssertionError as error:
        raise ModelError(
            f"model.renderer {name!r} does not fit the tokenizer {tokenizer.name_or_path!r}: "
            f'{error}. Use model.renderer: "auto", or the family of this model.'
        ) from error
    except ValueError as error:
        takes = ", ".join(sorted(template_field_names(config))) or "none"
        raise ModelError(
            f"model.renderer {name!r} cannot be made with model.template_kwargs "
            f"{dict(template_kwargs)}: {error}. It takes these keywords: {takes}."
        ) from error


class RenderersCodec:
    """Implements `ChatCodec` with a renderer of the `renderers` library."""

    supports_tools = True

    def __init__(self, tokenizer: Any, renderer: Any) -> None:
        self._tokens = Tokens(tokenizer)
        self._renderer = renderer
        self._remembered = remembering(self._render)
        self._family = str(renderer.config.name)
        self.stop_token_ids: tuple[int, ...] = tuple(renderer.get_stop_token_ids())

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        return self._remembered(messages, tools)

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        prepared = self._prepared(messages)
        try:
            with self._tokens.lock:
                ids = self._renderer.render_ids(
                    prepared, tools=_tools(tools), add_generation_prompt=True
                )
        except (*TRIPS, AssertionError) as error:
            raise RequestError(
                f"The chat format {self._family!r} refuses these messages: {error}",
                code="invalid_messages",
                param="messages",
            ) from error
        return token_ids(ids)

    def extend(
        self,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
    ) -> TokenIds | None:
        new = self._prepared([*history, *new_messages])[len(history) :]
        known = np.concatenate([prompt_ids, completion_ids])
        try:
            with self._tokens.lock:
                bridged = self._renderer.bridge_to_next_turn(
                    prompt_ids.tolist(), completion_ids.tolist(), new, tools=_tools(tools)
                )
        except (*TRIPS, AssertionError):  # the full render will say why
            return None
        if bridged is None:
            return None
        ids = token_ids(bridged.token_ids)
        verbatim = len(ids) > len(known) and np.array_equal(ids[: len(known)], known)
        return ids if verbatim else None

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        ids = cut_at_stop(completion_ids, self.stop_token_ids).tolist()
        try:
            with self._tokens.lock:  # some families tell a call by the stop token
                parsed = self._renderer.parse_response(
                    completion_ids.tolist(), tools=_tools(tools), prompt_ids=prompt_ids.tolist()
                )
        except TRIPS:
            return structured(self._tokens.decode(ids), None, (), prompt_ids, completion_ids)
        whole = [
            attempt
            for attempt in parsed.tool_calls
            if tools and attempt.status in ("ok", "unknown_tool") and isinstance(attempt.name, str)
        ]
        calls = [FoundCall(attempt.name, attempt.arguments, attempt.id) for attempt in whole]
        reasoning = (parsed.reasoning_content or "").strip() or None
        content = self._content(parsed, whole, ids)
        return structured(content, reasoning, calls, prompt_ids, completion_ids)

    def _content(self, parsed: Any, whole: Sequence[Any], ids: list[int]) -> str:
        """The text, with what only looked like a tool call put back."""
        broken = [attempt for attempt in parsed.tool_calls if attempt not in whole]
        texts = [str(parsed.content)]
        if broken and not whole and broken[0].token_span:
            # Without any call, what follows the first attempt is text as well.
            texts.append(self._tokens.decode(ids[broken[0].token_span[0] :]))
        else:
            spans = [(slice(*b.token_span) if b.token_span else None, b) for b in broken]
            texts += [self._tokens.decode(ids[s]) if s else str(b.raw) for s, b in spans]
        return "\n".join(text for text in texts if text)

    def encode(self, text: str) -> TokenIds:
        return self._tokens.encode(text)

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        return self._tokens.decode(ids, skip_special=skip_special)

    def _prepared(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Copies in the shape the library reads: arguments as objects, and roles and names
        that the family would otherwise drop."""
        names: dict[str, str] = {}
        prepared: list[dict[str, Any]] = []
        for message in messages:
            copy = dict(message)
            if copy["role"] == "developer" and self._family not in _KNOW_DEVELOPER:
                copy["role"] = "system"
            if copy.get("tool_calls"):
                copy["tool_calls"] = [_with_object_arguments(c) for c in copy["tool_calls"]]
                names.update((c["id"], c["function"]["name"]) for c in copy["tool_calls"])
            if copy["role"] == "tool" and self._family in _WANT_TOOL_NAMES and "name" not in copy:
                copy["name"] = names.get(copy.get("tool_call_id", ""), "unknown")
            prepared.append(copy)
        return prepared


def _tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in tools] or None


def _with_object_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": parse_arguments(function["arguments"])}}
