"""Which codec a tokenizer gets, and that the library's families fit their templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from astuner.chat import ChatCodec, load_codec
from astuner.chat.codec import _probes
from astuner.chat.renderers_codec import RenderersCodec
from astuner.chat.template_codec import TemplateCodec
from astuner.errors import ModelError, RequestError

from .conversations import TOOLS
from .families import FAMILIES, codec, make, template_of, tokenizer

USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "and you?"}


def family_of(chat: ChatCodec) -> str:
    return chat._family if isinstance(chat, RenderersCodec) else "template"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "family"),
    [("qwen3", "qwen3"), ("qwen2.5", "template"), ("smollm2", "template"), ("llama-2", "template")],
)
def test_a_family_is_recognised_by_what_its_template_renders(name: str, family: str) -> None:
    assert family_of(load_codec(tokenizer(name))) == family


def test_a_fine_tune_with_another_template_is_not_taken_for_the_family() -> None:
    other = make(FAMILIES["qwen3"], template_of("qwen3").replace("# Tools", "# Your tools"))
    assert isinstance(load_codec(other), TemplateCodec)


def test_a_known_name_decides() -> None:
    assert family_of(load_codec(tokenizer("qwen3"), model_name="Qwen/Qwen3-0.6B")) == "qwen3"
    named = make(FAMILIES["llama-3"])
    named.name_or_path = "meta-llama/Llama-3.2-1B-Instruct"
    assert family_of(load_codec(named)) == "llama-3"


def test_the_renderer_can_be_named() -> None:
    assert family_of(load_codec(tokenizer("qwen3"), renderer="template")) == "template"
    assert family_of(load_codec(tokenizer("qwen2.5"), renderer="template")) == "template"
    with pytest.raises(
        ModelError, match=r"'qwen33', but must be auto, template or one of: .*qwen3"
    ):
        load_codec(tokenizer("qwen3"), renderer="qwen33")
    with pytest.raises(ModelError, match=r"'llama-3' does not fit .*begin_of_text"):
        load_codec(tokenizer("qwen3"), renderer="llama-3")


def test_keywords_reach_the_renderer_or_are_refused() -> None:
    for kwargs in ({"renderer": "qwen3"}, {"renderer": "auto"}, {"model_name": "Qwen/Qwen3-8B"}):
        chat = load_codec(tokenizer("qwen3"), template_kwargs={"enable_thinking": False}, **kwargs)
        assert family_of(chat) == "qwen3"
        assert chat.decode(chat.render([USER])).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(ModelError, match=r"takes these keywords: enable_thinking"):
        load_codec(tokenizer("qwen3"), renderer="qwen3", template_kwargs={"thinking": False})


@pytest.mark.parametrize("name", ["qwen3", "llama-3"])
def test_the_committed_templates_are_those_of_the_families(name: str) -> None:
    """The library is tested against the published templates; ours must agree with it."""
    library, bridge = codec(name), codec(f"{name}-bridge")
    probes = list(_probes())
    assert len(probes) >= 6
    for messages, tools in probes:
        assert library.render(messages, tools).tolist() == bridge.render(messages, tools).tolist()


def extended(chat: ChatCodec, text: str, *new: dict[str, Any], tools: Any = ()) -> str | None:
    prompt, completion = chat.render([USER], tools), chat.encode(text)
    reply = {"role": "assistant", "content": "Fine."}
    ids = chat.extend(prompt, completion, [USER, reply], new, tools)
    known = [*prompt.tolist(), *completion.tolist()]
    assert ids is None or ids[: len(known)].tolist() == known
    return None if ids is None else chat.decode(ids[len(known) :], skip_special=False)


def test_the_library_extends_within_a_tool_cycle_and_closes_what_was_cut() -> None:
    result = {"role": "tool", "content": "3", "tool_call_id": "x"}
    turn = "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>"
    delta = f"\n{turn}\n<|im_start|>assistant\n"
    chat = codec("qwen3")
    assert extended(chat, "Fine.<|im_end|>", result, tools=TOOLS) == delta
    assert extended(chat, "Fine.", result, tools=TOOLS) == "<|im_end|>" + delta
    assert extended(chat, "<think>\nHm", result, tools=TOOLS) == "</think><|im_end|>" + delta
    assert extended(chat, "Fine.<|im_end|>", MORE) is None
    assert extended(chat, "Fine.<|im_end|>", {"role": "assistant", "content": "x"}) is None


def test_qwen3_without_reasoning_is_extended_over_questions() -> None:
    """Its instruct releases have no reasoning to drop; with thinking off there is none."""
    delta = "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n"
    instruct = make(FAMILIES["qwen3"], template_of("qwen2.5"))
    chat = load_codec(instruct, model_name="Qwen/Qwen3-4B-Instruct-2507")
    assert extended(chat, "Fine.<|im_end|>", MORE) == delta
    off = load_codec(tokenizer("qwen3"), template_kwargs={"enable_thinking": False})
    assert extended(off, "Fine.<|im_end|>", MORE) == delta + "<think>\n\n</think>\n\n"


def test_what_the_family_refuses_is_the_clients_error() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    two = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    with pytest.raises(RequestError, match=r"'llama-3' refuses these messages: .*single tool call"):
        codec("llama-3").render([USER, two], TOOLS)
    text = codec("llama-3").render([{"role": "developer", "content": "S"}, USER])
    assert "\n\nS<|eot_id|>" in codec("llama-3").decode(text, skip_special=False)


def test_no_template_at_all() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        load_codec(make(replace(FAMILIES["smollm2"]), ""))
