"""Streaming text: whole characters, and in the end exactly the text."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from astuner.chat import Detokenizer

from .families import codec

chats = pytest.mark.parametrize("family", ["smollm2", "llama-2", "qwen3"])


@chats
def test_a_character_of_many_tokens_comes_whole(family: str) -> None:
    chat = codec(family)
    ids = chat.encode("a🙂b").tolist()
    assert len(ids) >= 5  # the emoji takes four bytes, each a token
    told = Detokenizer(chat)
    pieces = [told.push([i]) for i in ids]
    assert "".join(pieces) + told.finish() == chat.decode(ids)
    # Llama-2 spells it in bytes, which count only once something else follows.
    assert [p for p in pieces if p.strip()] == (
        ["a", "🙂b"] if family == "llama-2" else ["a", "🙂", "b"]
    )


@chats
def test_bytes_that_never_become_a_character_come_last(family: str) -> None:
    chat = codec(family)
    ids = chat.encode("a🙂").tolist()[:-1]
    told = Detokenizer(chat)
    text = "".join(told.push([i]) for i in ids)
    assert text.strip() == "a"
    rest = told.finish()
    assert rest.strip("\ufffd") == "" and text + rest == chat.decode(ids)
    assert told.finish() == ""


@chats
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_pieces_join_to_the_text(family: str, data: st.DataObject) -> None:
    chat = codec(family)
    some = st.integers(0, 480) | st.sampled_from(chat.stop_token_ids)
    ids = data.draw(st.lists(some, max_size=20))
    words = chat.encode(data.draw(st.text("aé你🙂 \n", max_size=8))).tolist()
    ids = [*ids, *words]
    told, text, i = Detokenizer(chat), "", 0
    while i < len(ids):
        step = data.draw(st.integers(1, 4))
        text += told.push(ids[i : i + step])
        i += step
    assert text + told.finish() == chat.decode(ids)
