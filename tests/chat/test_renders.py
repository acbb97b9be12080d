"""What is rendered once and remembered is what would be rendered again."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from astuner.chat.codec import load_codec
from astuner.chat.protocol import Message, Tool
from astuner.chat.renders import remembering
from astuner.errors import RequestError
from astuner.types import TokenIds, token_ids

from .families import tokenizer

USER: Message = {"role": "user", "content": "What is 1 + 1?"}


class Renderer:
    """One id for each message, and the number of tools."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        self.asked += 1
        if messages[0]["role"] == "tool":
            raise RequestError("A tool message cannot come first.")
        return token_ids([len(m["content"]) for m in messages] + [len(tools)])


@pytest.fixture(autouse=True)
def _noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 43_200.0)


def test_the_same_messages_are_rendered_once() -> None:
    render = Renderer()
    remembered = remembering(render)
    first = remembered([USER])
    again = remembered((dict(USER),))
    assert first.tolist() == again.tolist() == [14, 0]
    assert render.asked == 1
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([{**USER, "content": "What is 1 + 1? "}], []),
        ([{**USER, "name": "Ann"}], []),
        ([USER, USER], []),
        ([USER], [{"type": "function", "function": {"name": "add"}}]),
    ],
)
def test_whatever_differs_is_rendered_anew(messages: list[Message], tools: list[Tool]) -> None:
    render = Renderer()
    remembered = remembering(render)
    remembered([USER])
    assert remembered(messages, tools).tolist() == render(messages, tools).tolist()
    assert render.asked == 3


def test_a_later_minute_is_rendered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    render = Renderer()
    remembered = remembering(render)
    remembered([USER])
    monkeypatch.setattr(time, "time", lambda: 43_259.9)
    remembered([USER])
    assert render.asked == 1
    monkeypatch.setattr(time, "time", lambda: 43_260.0)
    remembered([USER])
    assert render.asked == 2


def test_a_refusal_is_told_each_time() -> None:
    remembered = remembering(Renderer())
    for _ in range(2):
        with pytest.raises(RequestError, match="cannot come first"):
            remembered([{"role": "tool", "content": "2"}])


@pytest.mark.parametrize(("family", "renderer"), [("smollm2", "template"), ("qwen3", "qwen3")])
def test_the_codecs_remember(family: str, renderer: str) -> None:
    codec = load_codec(tokenizer(family), renderer=renderer)
    fresh = load_codec(tokenizer(family), renderer=renderer)
    ids = codec.render([USER])
    assert codec.render([dict(USER)]) is ids
    assert fresh.render([USER]).tolist() == ids.tolist()
