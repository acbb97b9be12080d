"""Tiny tokenizers with the special tokens and the chat template of real families."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from astuner.chat import ChatCodec, load_codec

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    """Added tokens that are not special: decoding keeps them."""
    eos: str = ""
    bos: str | None = None
    vocabulary: str = "bytes"
    kwargs: tuple[tuple[str, Any], ...] = ()
    renderer: str = "template"


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOOL_CALL = ("<tool_call>", "</tool_call>")
_QWEN3 = (*_TOOL_CALL, "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")  # noqa: RUF001
_DATE = (("date_string", "26 Jul 2024"),)

FAMILIES = {
    "smollm2": Family("smollm2", _CHATML, eos="<|im_end|>"),
    "qwen2.5": Family("qwen2.5", _CHATML, _TOOL_CALL, eos="<|im_end|>"),
    "qwen3-bridge": Family("qwen3", _CHATML, _QWEN3, eos="<|im_end|>"),
    "qwen3": Family("qwen3", _CHATML, _QWEN3, eos="<|im_end|>", renderer="qwen3"),
    "llama-3-bridge": Family(
        "llama-3.2", _LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>", kwargs=_DATE
    ),
    "llama-3": Family(
        "llama-3.2", _LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>", renderer="llama-3"
    ),
    "llama-2": Family("llama-2", (), eos="</s>", bos="<s>", vocabulary="metaspace"),
    "r1-distill": Family("r1-distill", _R1, ("<think>", "</think>"), eos=_R1[1], bos=_R1[0]),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return make(FAMILIES[name])


def template_of(name: str) -> str:
    return (HERE / "templates" / f"{name}.jinja").read_text().removesuffix("\n")


def make(family: Family, template: str | None = None) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; `template` in place of the family's own."""
    base = Tokenizer.from_file(str(HERE / "tokenizers" / f"{family.vocabulary}.json"))
    base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    base.add_tokens([AddedToken(t, normalized=False) for t in family.plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>" if family.vocabulary == "metaspace" else None,
        chat_template=template_of(family.template) if template is None else template,
    )


@cache
def codec(name: str) -> ChatCodec:
    family = FAMILIES[name]
    return load_codec(
        tokenizer(name), renderer=family.renderer, template_kwargs=dict(family.kwargs)
    )
