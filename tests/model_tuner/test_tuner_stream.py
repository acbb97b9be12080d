"""Streamed answers: chunks, their order, what is held back, and when they are recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from astuner.chat.byte_codec import END, ByteCodec, ids
from astuner.engine.fake import FakeEngine
from astuner.errors import EngineError
from astuner.model_tuner.deltas import Deltas
from astuner.model_tuner.server import TunerServer
from astuner.model_tuner.stops import StopStrings

from .tuner_world import CALL, TOOLS, USER, Make, World, reply, sampling


async def chunks_of(client: openai.AsyncOpenAI, **request: Any) -> list[ChatCompletionChunk]:
    stream = await client.chat.completions.create(model="", messages=USER, stream=True, **request)
    return [chunk async for chunk in stream]


def contents(chunks: list[ChatCompletionChunk], index: int = 0) -> list[str]:
    return [
        c.choices[0].delta.content
        for c in chunks
        if c.choices and c.choices[0].index == index and c.choices[0].delta.content
    ]


async def test_text_comes_token_by_token(make: Make) -> None:
    world = make("hi yo")
    chunks = await chunks_of(
        world.tuner.as_raw_openai_sdk_client(), stream_options={"include_usage": True}
    )
    assert contents(chunks) == ["h", "i", " y", "o"]
    assert {c.id for c in chunks} == {"chatcmpl-e1:0"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 4 + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 27
    assert world.sessions[0].calls[0].completion_ids.tolist() == reply("hi yo")


async def test_without_being_asked_no_usage_comes(make: Make) -> None:
    chunks = await chunks_of(make("a").tuner.as_raw_openai_sdk_client())
    assert all(c.usage is None and c.choices for c in chunks)


async def test_the_first_token_arrives_before_the_last_is_sampled(make: Make) -> None:
    world = make("ab", seconds_per_token=0.2)
    client = world.tuner.as_raw_openai_sdk_client()
    stream = await client.chat.completions.create(model="", messages=USER, stream=True)
    first = await asyncio.wait_for(anext(stream), 10)
    assert first.choices[0].delta.content == "a"
    assert (world.engine.active, world.sessions[0].calls) == (1, ())
    await stream.close()


async def test_tool_calls_come_whole_and_markup_never_as_text(make: Make) -> None:
    world = make(f"see {CALL}")
    chunks = await chunks_of(world.tuner.as_raw_openai_sdk_client(), tools=TOOLS)
    assert "".join(contents(chunks)) == "see"
    deltas = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert len(deltas) == 1
    call = (deltas[0] or [])[0]
    assert (call.index, call.id, call.type) == (0, "call_0", "function")
    assert call.function and (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_reasoning_is_streamed_apart(make: Make) -> None:
    chunks = await chunks_of(make("<think>hm a</think>42").tuner.as_raw_openai_sdk_client())
    thought = [c.choices[0].delta.model_dump().get("reasoning_content") or "" for c in chunks]
    assert "".join(thought) == "hm a"
    assert "".join(contents(chunks)) == "42"
    assert [t for t in thought if t] == ["h", "m", " a"]


async def test_a_stop_string_is_never_shown_in_part(make: Make) -> None:
    world = make("abc\nObs more")
    chunks = await chunks_of(world.tuner.as_raw_openai_sdk_client(), stop=["\nObs"])
    assert "".join(contents(chunks)) == "abc"
    assert world.sessions[0].calls[0].completion_ids.tolist() == ids("abc\nObs")
    assert world.engine.cancelled == 1


async def test_choices_are_interleaved_and_recorded_together(make: Make) -> None:
    world = make("aaaa", "b")
    chunks = await chunks_of(world.tuner.as_raw_openai_sdk_client(), n=2)
    assert "".join(contents(chunks, 0)) == "aaaa"
    assert "".join(contents(chunks, 1)) == "b"
    assert [c.choices[0].finish_reason for c in chunks[-2:]] == ["stop", "stop"]
    calls = world.sessions[0].calls
    assert [c.completion_ids.tolist() for c in calls] == [[97] * 4 + [END], [98, END]]


async def test_logprobs_are_told_once_each(make: Make) -> None:
    world = make("é!")
    chunks = await chunks_of(world.tuner.as_raw_openai_sdk_client(), logprobs=True)
    told = [c.choices[0].logprobs for c in chunks]
    rows = [row for logprobs in told if logprobs for row in logprobs.content or ()]
    assert len(rows) == 4
    assert contents(chunks) == ["é", "!"]


async def test_recorded_before_the_last_chunk_is_sent(make: Make) -> None:
    world = make("a")
    stream = await world.tuner.as_raw_openai_sdk_client().chat.completions.create(
        model="", messages=USER, stream=True
    )
    async for chunk in stream:
        if chunk.choices[0].finish_reason:
            assert len(world.sessions[0].calls) == 1
            break
    else:
        pytest.fail("no finish_reason came")


async def test_an_engine_that_fails_before_the_first_token_is_a_plain_503(make: Make) -> None:
    client = make(EngineError("out of memory")).tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        await chunks_of(client)


async def test_an_engine_that_fails_in_mid_stream_is_an_error_event(make: Make) -> None:
    world = make("abc", seconds_per_token=0.05)
    client = world.tuner.as_raw_openai_sdk_client()
    stream = await client.chat.completions.create(model="", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="was closed"):
        async for _ in stream:
            world.engine.close()
    assert world.sessions[0].calls == ()
    assert [p.code for p in world.sessions[0].problems] == ["engine_closed"]


PIECES = ["<think>", "</think>", CALL, "a", "word ", " ", "<", "</", "\n", "é", "{", "STOP"]


@settings(max_examples=60, deadline=None)
@example(["<think>", "STOP"], False, True, 1)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8), st.booleans(), st.booleans(), st.integers(1, 9)
)
def test_streamed_parts_join_to_the_whole_answer(
    pieces: list[str], tools: bool, stop: bool, chunk_tokens: int
) -> None:
    engine = FakeEngine([reply("".join(pieces))], chunk_tokens=chunk_tokens)
    world = World(engine, TunerServer(engine, ByteCodec()))
    options: dict[str, Any] = {"tools": TOOLS} if tools else {}
    options |= {"stop": ["STOP"]} if stop else {}

    async def both() -> None:
        client = world.session(sampling=sampling(max_tokens=999)).tuner.as_raw_openai_sdk_client()
        whole = await client.chat.completions.create(model="", messages=USER, **options)
        message = whole.choices[0].message.model_dump()
        deltas = [c.choices[0].delta.model_dump() for c in await chunks_of(client, **options)]
        for part in ("content", "reasoning_content"):
            assert "".join(d.get(part) or "" for d in deltas) == (message.get(part) or "")
        calls = [c for d in deltas for c in d["tool_calls"] or ()]
        assert [c["function"] for c in calls] == [
            c["function"] for c in message["tool_calls"] or ()
        ]

    asyncio.run(both())
    one, two = world.sessions[0].calls
    assert one.completion_ids.tolist() == two.completion_ids.tolist()


# ---------------------------------------------------------------- deltas


def grown(text: str, *, stops: tuple[str, ...] = (), tools: bool = False) -> list[str]:
    codec = ByteCodec()

    def read(some: Any) -> tuple[str, str]:
        return "", codec.decode(some)

    deltas, whole = Deltas(read, StopStrings(stops, codec), tools=tools), ids(text)
    parts = [deltas.grow(whole[: n + 1])[1] for n in range(len(whole))]
    return [*parts, deltas.rest("", text)[1]]


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("ab", {}, ["a", "b", ""]),
        ("a b", {}, ["a", "", " b", ""]),
        ("é", {}, ["", "é", ""]),
        ("a<b", {}, ["a", "", "", "<b"]),
        ("a{b", {}, ["a", "{", "b", ""]),
        ("a{b", {"tools": True}, ["a", "", "", "{b"]),
        ("abcd", {"stops": ("xyz",)}, ["", "", "a", "b", "cd"]),
    ],
)
def test_what_is_shown_when(text: str, options: Any, parts: list[str]) -> None:
    assert grown(text, **options) == parts


def test_a_tag_that_turned_out_to_be_text_is_shown_later() -> None:
    parts = grown("a < b and so on and on")
    assert [p for p in parts if p] == ["a", " < b and so on and", " o", "n"]


def test_parsing_again_is_spaced_out() -> None:
    lengths: list[int] = []

    def read(some: Any) -> tuple[str, str]:
        lengths.append(len(some))
        return "", ""

    deltas, whole = Deltas(read, StopStrings((), ByteCodec()), tools=False), [97] * 2000
    for n in range(2000):
        deltas.grow(whole[: n + 1])
    assert lengths[:63] == list(range(1, 64))
    assert len(lengths) < 200
    assert sum(lengths) < 40 * 2000
