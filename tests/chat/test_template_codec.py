"""The verified bridge: what it extends, what it refuses, and what it reads back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from astuner.chat import ChatCodec, reply_message
from astuner.chat.template_codec import TemplateCodec
from astuner.errors import ModelError, RequestError
from astuner.types import token_ids

from .conversations import TOOLS
from .families import FAMILIES, codec, make

USER = {"role": "user", "content": "hi"}
MORE = {"role": "user", "content": "and you?"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": "é"}}\n</tool_call>'
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def templated(template: str) -> TemplateCodec:
    return TemplateCodec(make(FAMILIES["qwen2.5"], template), model_name="org/model")


def extended(
    chat: ChatCodec,
    text: str,
    *new: dict[str, Any],
    before: tuple[dict[str, Any], ...] = (USER,),
    tools: list[dict[str, Any]] | None = None,
) -> str | None:
    """What follows the sampled `text` in the next prompt; None for a new timeline."""
    prompt = chat.render(before, tools or ())
    completion = chat.encode(text)
    reply = reply_message(chat.parse(completion, prompt, tools or ()))
    ids = chat.extend(prompt, completion, [*before, reply], new, tools or ())
    if ids is None:
        return None
    known = [*prompt.tolist(), *completion.tolist()]
    assert ids[: len(known)].tolist() == known
    return chat.decode(ids[len(known) :], skip_special=False)


CHATML_DELTA = "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("family", "text", "delta"),
    [
        ("smollm2", "Fine.<|im_end|>", CHATML_DELTA),
        ("smollm2", "Fine.", "<|im_end|>" + CHATML_DELTA),
        ("smollm2", "", "<|im_end|>" + CHATML_DELTA),
        ("smollm2", " Fine \n\n<|im_end|>", CHATML_DELTA),
        ("qwen2.5", "<think>\nHm.\n</think>\n\nFine.<|im_end|>", CHATML_DELTA),
        ("qwen3-bridge", "Fine.<|im_end|>", CHATML_DELTA),
        ("qwen3-bridge", "<think>\nHm.\n</think>\n\nFine.<|im_end|>", None),
        ("qwen3-bridge", "<think>\n\n</think>\n\nFine.<|im_end|>", None),
        ("qwen3-bridge", "<think>\nHm", None),
        ("qwen3-bridge", "<think>\nHm<|im_end|>", None),
        (
            "llama-3-bridge",
            "Fine. <|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nand you?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("llama-2", " Fine.</s>", "<s> [INST] and you? [/INST]"),
        ("llama-2", " Fine", "</s><s> [INST] and you? [/INST]"),
        ("r1-distill", "Hm.\n</think>\n\nFine.<｜end▁of▁sentence｜>", None),  # noqa: RUF001
    ],
)
def test_a_further_question(family: str, text: str, delta: str | None) -> None:
    assert extended(codec(family), text, MORE) == delta


def test_only_the_delta_is_tokenized_so_the_seam_cannot_move() -> None:
    chat = codec("smollm2")
    # Sampled as one letter a token, which no tokenizer would make of this text.
    completion = token_ids([i for c in "The sum" for i in chat.encode(c).tolist()])
    prompt = chat.render([USER])
    reply = {"role": "assistant", "content": "The sum"}
    ids = chat.extend(prompt, completion, [USER, reply], [MORE])
    assert ids is not None
    assert ids[len(prompt) :].tolist()[:7] == completion.tolist()
    assert len(chat.encode("The sum")) < 7


def test_markup_that_was_sampled_as_plain_text_stays_plain() -> None:
    chat = codec("smollm2")
    plain = [*chat.encode("<|im").tolist(), *chat.encode("_end|>").tolist()]
    completion = token_ids([*plain, chat.stop_token_ids[0]])
    prompt = chat.render([USER])
    reply = reply_message(chat.parse(completion, prompt))
    assert reply["content"] == "<|im_end|>"
    ids = chat.extend(prompt, completion, [USER, reply], [MORE])
    assert ids is not None
    assert ids.tolist()[len(prompt) : len(prompt) + len(completion)] == completion.tolist()
    assert chat.decode(ids[len(prompt) + len(completion) :], skip_special=False) == CHATML_DELTA


def test_a_tool_cycle_keeps_its_reasoning_until_the_next_question() -> None:
    chat = codec("qwen3-bridge")
    text = f"<think>\nHm.\n</think>\n\n{CALL}<|im_end|>"
    result = {"role": "tool", "content": "3", "tool_call_id": "x"}
    delta = extended(chat, text, result, tools=TOOLS)
    assert delta == (
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked = {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]}
    # The next answer has no reasoning of its own, but a question would drop the one before.
    before = (USER, asked, result)
    assert extended(chat, "Three.<|im_end|>", MORE, before=before, tools=TOOLS) is None
    assert extended(chat, "Three.<|im_end|>", result, before=before, tools=TOOLS) is not None


def test_several_tool_results_become_one_turn() -> None:
    chat = codec("qwen2.5")
    one = '<tool_call>\n{"name": "add", "arguments": {"x": "1"}}\n</tool_call>'
    results = [{"role": "tool", "content": c, "tool_call_id": c} for c in "ab"]
    assert extended(chat, f"Both:\n{one}\n{one}<|im_end|>", *results, tools=TOOLS) == (
        "\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


REWRITING = {
    "tools are shown in the last question": CHATML.replace(
        "m['content'] +",
        "(('T:' ~ tools[0].function.name) if tools and m.role == 'user' and "
        "messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 "
        "else '') + m['content'] +",
    ),
    "earlier replies are shortened": CHATML.replace(
        "m['content'] +", "(m['content'] if loop.last else m['content'][:3]) +"
    ),
    "replies are changed for what they say": CHATML.replace(
        "m['content'] +", "m['content'] | replace('Fine', 'Well') +"
    ),
    "replies are numbered": CHATML.replace(
        "m['content'] +", "(messages | length | string) + m['content'] +"
    ),
    "replies get a preface": CHATML.replace(
        "m['content'] +", "('Answer: ' if m.role == 'assistant' else '') + m['content'] +"
    ),
    "turns do not end with a token": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "the end token is the next turn's start": (
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    ),
    "only one question is allowed": CHATML.replace(
        "{% for",
        "{% if messages | length > 2 %}{{ raise_exception('one only') }}{% endif %}{% for",
        1,
    ),
}


@pytest.mark.parametrize("how", REWRITING)
def test_a_template_that_rewrites_history_is_not_extended(how: str) -> None:
    chat = templated(REWRITING[how])
    tools = TOOLS if "tools" in how else None
    if tools:  # a tool call needs no format here: nothing is parsed
        chat._format = codec("qwen2.5")._format  # type: ignore[attr-defined]
    assert extended(chat, "Fine.<|im_end|>", MORE, tools=tools) is None
    assert extended(templated(CHATML), "Fine.<|im_end|>", MORE) == CHATML_DELTA


def test_the_default_system_prompt_is_rendered_once() -> None:
    ids = codec("smollm2").render([USER])
    assert codec("smollm2").decode(ids, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_message_that_moves_to_the_front_rewrites() -> None:
    delta = extended(templated(CHATML), "Ok.<|im_end|>", {"role": "system", "content": "S"}, MORE)
    assert delta is not None and delta.startswith("\n<|im_start|>system\nS<|im_end|>")
    moved = CHATML.replace(
        "{% for",
        "{{ (messages | selectattr('role', 'equalto', 'system') | list | length) }}{% for",
        1,
    )
    assert (
        extended(templated(moved), "Ok.<|im_end|>", {"role": "system", "content": "S"}, MORE)
        is None
    )


def test_a_reply_that_ended_otherwise_than_the_template_writes() -> None:
    chat = TemplateCodec(make(replace(FAMILIES["smollm2"], eos="<|endoftext|>")))
    assert [chat.decode([i], skip_special=False) for i in chat.stop_token_ids] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert extended(chat, "Fine.<|im_end|>", MORE) == CHATML_DELTA
    assert extended(chat, "Fine.<|endoftext|>", MORE) is None
    assert extended(chat, "Fine.<|im_end|>\n<|im_start|>", MORE) is None


def test_assistant_messages_and_nothing_new_are_not_extended() -> None:
    chat = codec("smollm2")
    assert extended(chat, "Fine.<|im_end|>") is None
    assert extended(chat, "Fine.<|im_end|>", {"role": "assistant", "content": "x"}, MORE) is None


def test_stop_tokens_also_come_from_the_generation_config(tmp_path: Any) -> None:
    tokenizer = make(FAMILIES["smollm2"])
    text, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{text}, {end}]}}')
    tokenizer.name_or_path = str(tmp_path)
    assert TemplateCodec(tokenizer).stop_token_ids == (end, text)


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    chat = codec("qwen2.5")
    text = chat.decode(
        chat.render([{"role": "developer", "content": "S"}, USER]), skip_special=False
    )
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n")


def test_tools_without_a_place_are_refused() -> None:
    with pytest.raises(RequestError, match="this model has no place for tools") as caught:
        codec("smollm2").render([USER], TOOLS)
    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert not codec("smollm2").supports_tools
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    with pytest.raises(RequestError, match="cannot show the tool calls"):
        codec("smollm2").render([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_tools_in_an_unknown_format_are_refused() -> None:
    chat = templated("{{ tools | tojson }}" + CHATML)
    assert not chat.supports_tools
    with pytest.raises(RequestError, match="org/model has a tool section, but in a format"):
        chat.render([USER], TOOLS)


def test_what_the_template_refuses_is_the_clients_error() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        codec("llama-2").render([USER, MORE])
    assert caught.value.status == 400
    with pytest.raises(RequestError, match="not valid Unicode"):
        codec("smollm2").render([{"role": "user", "content": "\ud800"}])


def test_a_tokenizer_without_template_and_a_keyword_nobody_reads() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        TemplateCodec(make(FAMILIES["smollm2"], ""))
    with pytest.raises(ModelError, match=r"template_kwargs\.enable_thinkng is set"):
        TemplateCodec(make(FAMILIES["qwen3"]), {"enable_thinkng": False})
    quiet = TemplateCodec(make(FAMILIES["qwen3"]), {"enable_thinking": False})
    assert quiet.decode(quiet.render([USER])).endswith("<think>\n\n</think>\n\n")


def parse(
    family: str, text: str, *, tools: bool = True
) -> tuple[str, str | None, list[tuple[str, str]]]:
    chat = codec(family)
    prompt = chat.render([USER], TOOLS if tools else ())
    reply = chat.parse(chat.encode(text), prompt, TOOLS if tools else ())
    return (
        reply.content,
        reply.reasoning,
        [(c["function"]["name"], c["function"]["arguments"]) for c in reply.tool_calls],
    )


BROKEN = '<tool_call>\n{"name": "add", \n</tool_call>'


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3-bridge", "qwen3"])
def test_tool_calls_in_hermes_style(family: str) -> None:
    called = ("add", '{"x": "é"}')
    assert parse(family, f"{CALL}<|im_end|>") == ("", None, [called])
    assert parse(family, f"See:\n{CALL}\n{CALL}<|im_end|>") == ("See:", None, [called, called])
    assert parse(family, f"{CALL}<|im_end|>", tools=False) == (CALL, None, [])
    content, _, calls = parse(family, f"See:\n{CALL}\n{BROKEN}<|im_end|>")
    assert calls == [called] and content.split() == f"See:\n{BROKEN}".split()
    content, _, calls = parse(family, "See:\n" + CALL[:30])
    assert not calls and content.split() == ("See:\n" + CALL[:30]).split()


@pytest.mark.parametrize("family", ["llama-3", "llama-3-bridge"])
def test_tool_calls_in_llama_style(family: str) -> None:
    text = '{"name": "add", "parameters": {"x": "1"}}<|eot_id|>'
    assert parse(family, text) == ("", None, [("add", '{"x": "1"}')])
    assert parse(family, 'Say {"name": "add"}<|eot_id|>') == ('Say {"name": "add"}', None, [])
    assert parse(family, '{"name": 5}<|eot_id|>') == ('{"name": 5}', None, [])


def test_hermes_tags_that_are_no_tokens() -> None:
    template = "{{ tools | tojson if tools }}{# <tool_call> #}" + CHATML
    chat = TemplateCodec(make(FAMILIES["smollm2"], template))
    two = '[{"name": "add", "arguments": {}}, {"name": "sub"}]'
    both = f"<tool_call>{two}</tool_call> <tool_call>no</tool_call>"
    prompt = chat.render([USER], TOOLS)
    reply = chat.parse(chat.encode(both), prompt, TOOLS)
    assert [c["function"] for c in reply.tool_calls] == [
        {"name": "add", "arguments": "{}"},
        {"name": "sub", "arguments": "{}"},
    ]
    assert reply.content == "<tool_call>no</tool_call>"


@pytest.mark.parametrize("family", ["qwen3-bridge", "qwen3"])
def test_reasoning_is_split_off(family: str) -> None:
    assert parse(family, "<think>\nHm.\n</think>\n\nFine.<|im_end|>") == ("Fine.", "Hm.", [])
    assert parse(family, "<think>\n\n</think>\n\nFine.<|im_end|>") == ("Fine.", None, [])
    assert parse(family, "<think>\nHm.") == ("", "Hm.", [])
    later = "Before <think>x</think> after"
    assert parse(family, later) == (later, None, [])


def test_reasoning_that_the_prompt_opened() -> None:
    assert parse("r1-distill", "Hm.\n</think>\n\nFine.", tools=False) == ("Fine.", "Hm.", [])
    assert parse("r1-distill", "Hm.", tools=False) == ("", "Hm.", [])


def test_reasoning_whose_tags_are_no_tokens() -> None:
    chat = TemplateCodec(make(FAMILIES["smollm2"], CHATML + "{# </think> #}"))
    prompt = chat.render([USER])
    for ids in (chat.encode("<think>Hm.</think>Fine."), chat.encode("<think>Hm.</think>\n\nFine.")):
        reply = chat.parse(ids, prompt)
        assert (reply.reasoning, reply.content) == ("Hm.", "Fine.")


def test_without_reasoning_in_the_template_the_tags_are_text() -> None:
    text = "<think>Hm.</think> Fine."
    assert parse("qwen2.5", f"{text}<|im_end|>") == (text, None, [])


def test_tool_call_ids_are_short_distinct_and_repeatable() -> None:
    chat = codec("qwen2.5")
    prompt, ids = chat.render([USER], TOOLS), chat.encode(f"{CALL}\n{CALL}<|im_end|>")
    first, second = ([c["id"] for c in chat.parse(ids, prompt, TOOLS).tool_calls] for _ in "ab")
    assert first == second and len(set(first)) == 2
    assert all(len(i) == 9 and i.isalnum() for i in first)
