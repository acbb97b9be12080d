"""Which codec a tokenizer gets.

A model that the `renderers` library knows by its exact name gets that family's renderer;
so does a local folder or fine-tune whose chat template renders a set of probing
conversations to the very same ids. Every other one gets the verified bridge over its own
chat template. Loads no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from astuner.chat.protocol import ChatCodec, Message, Tool
from astuner.chat.renderers_codec import RenderersCodec, make_renderer
from astuner.chat.template import called
from astuner.chat.template_codec import TemplateCodec
from astuner.errors import ModelError, RequestError

_RECOGNISABLE = (
    "qwen3",
    "qwen3.5",
    "qwen3.6",
    "qwen3.8",
    "llama-3",
    "glm-4.5",
    "glm-5",
    "deepseek-v3",
    "deepseek-r1",
    "minimax-m2",
    "kimi-k2",
    "hy3",
    "nemotron-3",
)
"""Text families whose renderers need nothing but the tokenizer."""


def load_codec(
    tokenizer: Any,
    *,
    renderer: str = "auto",
    template_kwargs: Mapping[str, Any] | None = None,
    model_name: str = "",
) -> ChatCodec:
    """The codec of `tokenizer`: `renderer` is "auto", "template" or a family's name.

    `model_name` is the hub name, where it is not the tokenizer's own `name_or_path`.
    Raises ModelError for an unknown family, one that does not fit the tokenizer, a
    template keyword that nothing uses, or a tokenizer without any chat template.
    """
    kwargs = dict(template_kwargs or {})
    if renderer == "template":
        return TemplateCodec(tokenizer, kwargs, model_name)
    if renderer != "auto":
        return RenderersCodec(tokenizer, make_renderer(tokenizer, renderer, kwargs))
    from renderers.base import MODEL_RENDERER_MAP

    named = (MODEL_RENDERER_MAP.get(n) for n in (model_name, str(tokenizer.name_or_path)))
    family = next((n for n in named if n is not None), None)
    if family is not None:
        fields = _retention(tokenizer, family)
        return RenderersCodec(tokenizer, make_renderer(tokenizer, family, kwargs, **fields))
    codec = TemplateCodec(tokenizer, kwargs, model_name)
    known = _recognise(tokenizer, codec, kwargs)
    return codec if known is None else RenderersCodec(tokenizer, known)


def _retention(tokenizer: Any, family: str) -> dict[str, str]:
    """Qwen3's instruct releases share the family's name but not its habit of dropping
    earlier reasoning: their templates know none, so a new question rewrites nothing."""
    template = tokenizer.chat_template
    drops = not isinstance(template, str) or "</think>" in template
    return {} if family != "qwen3" or drops else {"thinking_retention": "all"}


def _recognise(tokenizer: Any, codec: TemplateCodec, kwargs: Mapping[str, Any]) -> Any | None:
    """The family that renders every probe to the ids of the tokenizer's own template.

    Compared without keywords: with some, a family departs from its template on purpose so
    as not to rewrite history.
    """
    plain = TemplateCodec(tokenizer) if kwargs else codec
    wanted = [_ids(plain, messages, tools) for messages, tools in _probes()]
    for family in _RECOGNISABLE:
        try:
            found = RenderersCodec(tokenizer, make_renderer(tokenizer, family, {}))
            if all(
                _ids(found, messages, tools) == ids
                for (messages, tools), ids in zip(_probes(), wanted, strict=True)
            ):
                return make_renderer(tokenizer, family, kwargs)
        except ModelError:  # another family's tokenizer
            continue
    return None


def _ids(codec: ChatCodec, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int] | None:
    try:
        return codec.render(messages, tools).tolist()
    except RequestError:
        return None


def _probes() -> Iterator[tuple[list[Message], list[Tool]]]:
    """Conversations in which chat templates are known to differ."""
    system: Message = {"role": "system", "content": "Be brief."}
    user: Message = {"role": "user", "content": "What is 1 + 1?\n"}
    thought: Message = {"role": "assistant", "content": " 2 ", "reasoning_content": "Add."}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [called("add")]}
    spoken: Message = {**call, "content": "Let me see."}
    thoughtful: Message = {**call, "reasoning_content": "Use the tool."}
    result: Message = {"role": "tool", "content": "2", "tool_call_id": "abcdefgh1"}
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}}
    function = {"name": "add", "description": "Adds.", "parameters": parameters}
    tools: list[Tool] = [{"type": "function", "function": function}]
    yield [user], []
    yield [system, user, thought, user], []
    yield [user], tools
    yield [system, user, call, result], tools
    yield [user, thoughtful, result], tools
    yield [user, spoken, result, result, thought, user, call, result], tools
