"""POST /v1/messages as the unmodified anthropic SDK sees it; tokens are in the dialects' test."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import anthropic
import httpx
import pytest

from astuner.chat.byte_codec import ByteCodec, ids
from astuner.engine.fake import FakeEngine
from astuner.errors import EngineError, MissingDependency
from astuner.model_tuner.dialects.messages_request import RAW, arguments_of, input_of
from astuner.model_tuner.server import TunerServer

from .tuner_world import CALL, PROMPT, USER, Make, World, reply, sampling

ADD: Any = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}


def client_of(world: World, **spec: Any) -> anthropic.AsyncAnthropic:
    spec = {"sampling": sampling(max_tokens=500), **spec}
    return world.session(**spec).tuner.as_raw_anthropic_sdk_client()


def ask(client: anthropic.AsyncAnthropic, **request: Any) -> Any:
    request = {"model": "claude", "max_tokens": 300, "messages": USER, **request}
    return client.messages.create(**request)


async def events_of(client: anthropic.AsyncAnthropic, **request: Any) -> list[Any]:
    return [event async for event in await ask(client, stream=True, **request)]


async def test_a_text_answer(make: Make) -> None:
    world = make("hello", prefill_cached=5)
    answer = await ask(client_of(world), metadata={"user_id": "me"}, extra_body={"top_k": 3})
    assert (answer.id, answer.type, answer.model) == ("msg_e1:0", "message", "astuner")
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == (
        "assistant",
        "end_turn",
        None,
    )
    assert [b.to_dict() for b in answer.content] == [{"type": "text", "text": "hello"}]
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens) == (16, 5)
    assert answer.usage.output_tokens == 6
    (call,) = world.sessions[0].calls
    assert call.prompt_ids.tolist() == PROMPT
    assert call.request["messages"] == USER
    assert world.engine.params[0].max_tokens == 300


@pytest.mark.parametrize(
    ("request_", "text", "reason", "sequence", "shown"),
    [
        ({"max_tokens": 2}, "hello", "max_tokens", None, "he"),
        ({"stop_sequences": ["zz", "Obs"]}, "one Obs two", "stop_sequence", "Obs", "one "),
        ({"stop_sequences": ["zz"]}, "one", "end_turn", None, "one"),
        ({"tools": [ADD]}, f"see {CALL}", "tool_use", None, "see"),
        ({"stop_sequences": ["STOP"]}, "<think>a STOP", "stop_sequence", "STOP", ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_why_it_stopped(
    make: Make, request_: Any, text: str, reason: str, sequence: Any, shown: str, stream: bool
) -> None:
    client = client_of(make(text))
    if stream:
        last = (await events_of(client, **request_))[-2]
        assert (last.delta.stop_reason, last.delta.stop_sequence) == (reason, sequence)
    else:
        answer = await ask(client, **request_)
        assert (answer.stop_reason, answer.stop_sequence) == (reason, sequence)
        assert answer.content[0].text == shown


async def test_parallel_calls_are_blocks(make: Make) -> None:
    answer = await ask(client_of(make(f"see {CALL}{CALL}")), tools=[ADD])
    assert [b.type for b in answer.content] == ["text", "tool_use", "tool_use"]
    assert [(b.id, b.name, b.input) for b in answer.content[1:]] == [
        ("call_0", "add", {"a": 1}),
        ("call_1", "add", {"a": 1}),
    ]


@pytest.mark.parametrize(
    ("thinking", "kinds"),
    [
        (None, ["text"]),
        ({"type": "disabled"}, ["text"]),
        ({"type": "adaptive", "display": "omitted"}, ["text"]),
        ({"type": "adaptive"}, ["thinking", "text"]),
        ({"type": "enabled", "budget_tokens": 2048}, ["thinking", "text"]),
    ],
)
async def test_thinking_is_shown_to_those_who_ask(
    make: Make, thinking: Any, kinds: list[str]
) -> None:
    client = client_of(make("<think>hm</think>42"))
    more = {"thinking": thinking} if thinking else {}
    answer = await ask(client, **more)
    assert [b.type for b in answer.content] == kinds
    if "thinking" in kinds:
        block = answer.content[0]
        assert (block.thinking, block.signature) == ("hm", "e1:0")
    events = await events_of(client, **more)
    assert [e.content_block.type for e in events if e.type == "content_block_start"] == kinds


async def test_the_events_of_a_stream_in_their_order(make: Make) -> None:
    world = make(f"<think>t</think>hi {CALL}", prefill_cached=9)
    events = await events_of(client_of(world), tools=[ADD], thinking={"type": "adaptive"})
    delta, stop = "content_block_delta", "content_block_stop"
    assert [e.type for e in events] == [
        "message_start",
        *("content_block_start", delta, delta, stop),
        *("content_block_start", delta, delta, stop),
        *("content_block_start", delta, stop),
        *("message_delta", "message_stop"),
    ]
    assert [e.delta.type for e in events if e.type == delta] == [
        *("thinking_delta", "signature_delta", "text_delta", "text_delta", "input_json_delta")
    ]
    assert [e.index for e in events if e.type == "content_block_start"] == [0, 1, 2]
    start = events[0].message
    assert (start.id, start.content, start.stop_reason) == ("msg_e1:0", [], None)
    assert (start.usage.input_tokens, start.usage.cache_read_input_tokens) == (130, 9)
    assert events[-2].usage.output_tokens == len(reply(f"<think>t</think>hi {CALL}"))


PIECES = ["</think>", "</think>", CALL, "a", "word ", " ", "<", "é", "{"]


@pytest.mark.parametrize("seed", range(20))
async def test_a_stream_amounts_to_the_whole_answer(seed: int) -> None:
    dice = random.Random(seed)
    text = "<think>" * dice.randint(0, 1) + "".join(dice.choices(PIECES, k=6))
    engine = FakeEngine([reply(text)], chunk_tokens=dice.randint(1, 9))
    client = client_of(World(engine, TunerServer(engine, ByteCodec())))
    request: Any = {"tools": [ADD], "thinking": {"type": "adaptive"}}
    whole = await ask(client, **request)
    async with client.messages.stream(
        model="m", max_tokens=300, messages=USER, **request
    ) as stream:
        streamed = await stream.get_final_message()
    for block in (*whole.content, *streamed.content):
        if block.type == "thinking":
            block.signature = ""
    assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
    assert streamed.stop_reason == whole.stop_reason


# ---------------------------------------------------------------- messages


async def prompt_of(make: Make, messages: list[Any], **request: Any) -> list[int]:
    world = make("a")
    await ask(client_of(world), messages=messages, **request)
    return list(world.engine.prompts[0])


async def test_system_and_text_blocks(make: Make) -> None:
    blocks: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": blocks}]
    assert await prompt_of(make, messages, system="Be brief.") == ids(
        "⟦system\nBe brief.⟧\n⟦user\na\nb⟧\n⟦assistant\n"
    )


@pytest.mark.parametrize(
    ("content", "is_error", "shown"),
    [
        ("2", False, "2"),
        ([{"type": "text", "text": "2"}], False, "2"),
        (None, False, ""),
        ("no such file", True, "Error: no such file"),
        ("Error 7", True, "Error 7"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], True, "Error: a\nb"),
        ([], True, "Error: "),
    ],
)
async def test_tool_results(make: Make, content: Any, is_error: bool, shown: str) -> None:
    call = {"type": "tool_use", "id": "c", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "c", "is_error": is_error}
    result |= {} if content is None else {"content": content}
    prompt = await prompt_of(
        make,
        [
            *USER,
            {"role": "assistant", "content": [{"type": "text", "text": "see"}, call]},
            {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
        ],
    )
    called = '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert prompt == ids(
        f"⟦user\nhi⟧\n⟦assistant\nsee{called}⟧\n⟦tool\n{shown}⟧\n⟦user\nand now?⟧\n⟦assistant\n"
    )


@pytest.mark.parametrize(
    "arguments", ['{"a": 1}', "[1]", "3", "not json", '{"a": NaN}', '{"a": "\\ud800"}', "{}"]
)
def test_arguments_that_are_no_json_object_survive_the_way_there_and_back(arguments: str) -> None:
    there = input_of(arguments)
    assert arguments_of(there) == arguments
    assert set(there) == {RAW} or arguments.startswith('{"a": 1') or arguments == "{}"


async def test_tokens_are_counted_without_a_call(make: Make) -> None:
    world = make("a")
    client = client_of(world)
    assert (await client.messages.count_tokens(model="m", messages=USER)).input_tokens == 21  # type: ignore[arg-type]
    assert (world.engine.prompts, world.sessions[0].calls) == ([], ())
    await ask(client)
    more: Any = [*USER, {"role": "assistant", "content": "a"}, *USER]
    counted = await client.messages.count_tokens(model="m", messages=more, tools=[ADD])
    await ask(client, messages=more, tools=[ADD])
    assert counted.input_tokens == len(world.engine.prompts[1])


# ---------------------------------------------------------------- keys and refusals


async def test_either_header_and_one_of_ours_among_several(make: Make) -> None:
    world = make("a")
    world.server.start()
    endpoint = world.tuner.as_anthropic_baseurl_apikey()
    assert endpoint.base_url == world.server.base_url.replace("/v1", "/s1")
    body = {"model": "m", "max_tokens": 9, "messages": USER}
    ours, theirs = endpoint.api_key, "sk-ant-from-the-environment"
    url = f"{endpoint.base_url}/v1/messages"
    for headers in (
        {"x-api-key": ours},
        {"authorization": f"Bearer {ours}"},
        {"x-api-key": ours, "authorization": f"Bearer {theirs}"},
        {"x-api-key": theirs, "authorization": f"Bearer {ours}"},
    ):
        assert httpx.post(url, json=body, headers=headers, timeout=20).status_code == 200


async def test_a_wrong_key_and_an_ended_episode(make: Make) -> None:
    world = make("a")
    client = client_of(world)
    with pytest.raises(anthropic.AuthenticationError, match="belongs to no episode") as caught:
        await ask(client.with_options(api_key="sk-wrong"))
    error: Any = caught.value.body
    assert (error["type"], error["error"]["type"]) == ("error", "authentication_error")
    world.sessions[0].close()
    with pytest.raises(anthropic.AuthenticationError, match="Episode e1 has ended"):
        await ask(client.with_options(max_retries=5))


def image() -> list[Any]:
    source = {"type": "base64", "media_type": "image/png", "data": "x"}
    return [{"role": "user", "content": [{"type": "image", "source": source}]}]


def result_image() -> list[Any]:
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}
    return [{"role": "user", "content": [result]}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": image()}, "messages[0].content[0]", "'image', but the model reads text"),
        ({"messages": result_image()}, "messages[0].content[0].content[0]", "'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "text or a list"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role", "robot"),
        ({"messages": [*USER, {"role": "assistant", "content": "I"}]}, "messages", "mouth"),
        ({"max_tokens": None}, "max_tokens", "missing"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0]", "web_search"),
        ({"tools": [{"name": "w"}]}, "tools[0].input_schema", "must be an object"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs `tools`"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type", "'some'"),
        ({"thinking": {"type": "deep"}}, "thinking.type", "deep"),
        ({"output_config": {"effort": "low"}}, "output_config", "template_kwargs"),
        ({"container": "c"}, "container", "container"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "at least 1 character"),
        ({"foo": 1}, "foo", "foo=1 is not a parameter"),
    ],
)
async def test_a_bad_field_is_named(
    make: Make, fields: dict[str, Any], param: str, words: str
) -> None:
    world = make("a")
    body = {"model": "m", "max_tokens": 9, "messages": USER, **fields}
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        await client_of(world).post("/v1/messages", body=body, cast_to=object)
    error: Any = caught.value.body
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["param"] == param
    assert world.engine.prompts == [] and world.sessions[0].counters == {"refused": 1}


async def test_a_tool_choice_is_counted_when_unmet(make: Make) -> None:
    world = make("plain", "plain", "plain", CALL + CALL)
    client = client_of(world)
    await ask(client, tools=[ADD])
    await ask(client, tools=[ADD], tool_choice={"type": "any"})
    await ask(client, tools=[ADD], tool_choice={"type": "tool", "name": "add"})
    await ask(client, tools=[ADD], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    await ask(client, tools=[ADD], tool_choice={"type": "none"})
    assert world.sessions[0].counters["tool_choice_unmet"] == 3
    assert world.engine.prompts[4] == tuple(PROMPT)


async def test_an_engine_that_fails_before_and_in_mid_stream(make: Make) -> None:
    world = make(EngineError("out of memory"), "abc", seconds_per_token=0.05)
    client = client_of(world)
    with pytest.raises(anthropic.InternalServerError, match="out of memory"):
        await events_of(client)
    with pytest.raises(anthropic.APIStatusError, match="was closed"):
        async for event in await ask(client, stream=True):
            if event.type == "content_block_delta":
                world.engine.close()
    assert world.sessions[0].calls == ()


async def test_wrong_paths_are_told_in_the_dialects_shape(make: Make) -> None:
    world = make("a")
    world.server.start()
    endpoint = world.tuner.as_oai_baseurl_apikey()
    client = anthropic.AsyncAnthropic(base_url=endpoint.base_url, api_key=endpoint.api_key)
    with pytest.raises(anthropic.NotFoundError, match="goes without /v1") as caught:
        await ask(client)
    error: Any = caught.value.body
    assert error["error"]["type"] == "not_found_error"


async def test_a_bug_of_ours_is_told_in_the_dialects_shape(make: Make, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(ByteCodec, "parse", broken)
    with pytest.raises(anthropic.InternalServerError, match=r"A bug in astuner.*oops") as caught:
        await ask(client_of(make("a")).with_options(max_retries=5))
    error: Any = caught.value.body
    assert error["error"]["type"] == "api_error"


# ---------------------------------------------------------------- clients


def test_the_sync_sdk_over_loopback(make: Make) -> None:
    world = make("hi", CALL)
    world.server.start()
    session = world.session(sampling=sampling(max_tokens=500))
    client = session.tuner.as_raw_anthropic_sdk_client("solver", "policy", sync=True)
    messages: Any = USER
    answer: Any = client.messages.create(model="m", max_tokens=9, messages=messages)
    assert answer.content[0].text == "hi"
    with client.messages.stream(
        model="m", max_tokens=300, messages=messages, tools=[ADD]
    ) as stream:
        assert "".join(stream.text_stream) == ""
        final: Any = stream.get_final_message()
    assert (final.stop_reason, final.content[0].input) == ("tool_use", {"a": 1})
    assert {(c.agent_name, c.target_tag) for c in session.calls} == {("solver", "policy")}


async def test_leaving_in_mid_stream_stops_the_engine(make: Make) -> None:
    world = make([97] * 50, seconds_per_token=0.05)
    client = client_of(world)
    stream = await ask(client, stream=True)
    await asyncio.wait_for(anext(stream), 10)
    await stream.close()
    await world.until(lambda: world.engine.active == 0)
    assert (world.engine.cancelled, world.sessions[0].calls) == (1, ())


def test_without_the_sdk_the_install_line_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anthropic", None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[anthropic\]"'):
        make("a").tuner.as_raw_anthropic_sdk_client()
