"""RelayServer in front of another proxy of ours, which plays the foreign endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from astuner.errors import EngineError
from astuner.model_tuner import RelayServer, Session, SessionSpec
from astuner.types import FailureKind

from .tuner_world import CALL, PROMPT, TOOLS, USER, Make, World, reply, sampling


class Relayed:
    """A foreign endpoint, and the relay in front of it."""

    def __init__(self, foreign: World, **options: Any) -> None:
        self.foreign = foreign
        foreign.server.start()
        free = sampling(override=False, max_tokens=1000)
        key = foreign.session("foreign", sampling=free).tuner.as_oai_baseurl_apikey()
        options = {"call_timeout": 20.0, **options}
        self.server = RelayServer(key.base_url, "their-model", key.api_key, **options)

    def session(self, **spec: Any) -> Session:
        return self.server.open_session(SessionSpec("e1", **spec))

    @property
    def asked(self) -> Any:
        """The request as the foreign endpoint got it."""
        return self.foreign.sessions[0].calls[-1].request


@pytest.fixture
def relay(make: Make) -> Iterator[Any]:
    made: list[Relayed] = []

    def build(*replies: Any, engine: dict[str, Any] | None = None, **options: Any) -> Relayed:
        made.append(Relayed(make(*replies, **(engine or {})), **options))
        return made[-1]

    yield build
    for one in made:
        one.server.close()


async def test_passed_on_and_recorded_as_text(relay: Any) -> None:
    relayed = relay("hello")
    session = relayed.session(sampling=sampling(max_tokens=9, temperature=0.5))
    client = session.tuner.as_raw_openai_sdk_client("a", "t")
    answer = await client.chat.completions.create(model="x", messages=USER, temperature=0.1, seed=1)
    assert answer.choices[0].message.content == "hello"
    assert relayed.asked == {
        "model": "their-model",
        "messages": USER,
        "temperature": 0.5,
        "max_tokens": 9,
    }
    (call,) = session.close()
    assert call.response["content"] == "hello"
    assert (call.agent_name, call.target_tag, call.finish_reason) == ("a", "t", "stop")
    assert (len(call.prompt_ids), len(call.completion_ids)) == (0, 0)
    assert call.request["model"] == "x"
    assert session.counters == {"calls": 1, "overridden_sampling": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_where_the_endpoint_has_them(relay: Any, stream: bool) -> None:
    relayed = relay("hi", ask_token_ids=True)
    session = relayed.session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    answer: Any = await client.chat.completions.create(model="x", messages=USER, stream=stream)
    if stream:
        assert "".join([c.choices[0].delta.content or "" async for c in answer]) == "hi"
    (call,) = session.calls
    assert call.completion_ids.tolist() == reply("hi")
    assert call.logprobs.tolist() == [-0.5] * 3
    assert call.weight_versions.tolist() == [0] * 3
    assert call.prompt_ids.tolist() == PROMPT


async def test_a_stream_with_a_tool_call(relay: Any) -> None:
    relayed = relay(f"see {CALL}")
    session = relayed.session(sampling=sampling(max_tokens=500))
    client = session.tuner.as_raw_openai_sdk_client()
    stream = await client.chat.completions.create(
        model="x", messages=USER, tools=TOOLS, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "see"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    (call,) = session.calls
    assert call.response["content"] == "see"
    assert call.response["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_asked_again_is_one_call(relay: Any, stream: bool) -> None:
    relayed = relay(f"see {CALL}", "second")
    session = relayed.session(sampling=sampling(max_tokens=500))
    client = session.tuner.as_raw_openai_sdk_client()

    async def ask(**headers: str) -> tuple[str, list[str]]:
        answer: Any = await client.chat.completions.create(
            model="x", messages=USER, tools=TOOLS, stream=stream, extra_headers=headers
        )
        if not stream:
            message = answer.choices[0].message
            return message.content, [c.function.name for c in message.tool_calls or ()]
        deltas = [chunk.choices[0].delta async for chunk in answer if chunk.choices]
        calls = [c.function.name for d in deltas for c in d.tool_calls or ()]
        return "".join(d.content or "" for d in deltas), calls

    first = await ask()
    assert first == ("see", ["add"])
    assert await ask(**{"x-stainless-retry-count": "1"}) == first
    assert session.counters == {"calls": 1, "answered_again": 1}
    assert len(relayed.foreign.sessions[0].calls) == len(session.calls) == 1
    assert await ask() == ("second", [])  # the same words, but not asked again


async def test_a_stream_is_recorded_before_its_last_chunk(relay: Any) -> None:
    session = relay("a").session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    stream = await client.chat.completions.create(model="x", messages=USER, stream=True)
    seen = [len(session.calls) async for c in stream if c.choices[0].finish_reason]
    assert seen == [1]


async def test_choices_are_calls(relay: Any) -> None:
    session = relay("a", "b").session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    await client.chat.completions.create(model="x", messages=USER, n=2)
    assert [c.response["content"] for c in session.calls] == ["a", "b"]


async def test_the_same_refusals_as_in_training(relay: Any) -> None:
    relayed = relay("a")
    session = relayed.session(max_calls_per_agent=1)
    client = session.tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        await client.chat.completions.create(model="x", messages=USER, presence_penalty=1)
    await client.chat.completions.create(model="x", messages=USER)
    with pytest.raises(openai.PermissionDeniedError, match="1 calls"):
        await client.chat.completions.create(model="x", messages=USER)
    with pytest.raises(openai.NotFoundError, match="chat/completions only"):
        await client.completions.create(model="x", prompt="a")


async def test_a_failing_endpoint(relay: Any) -> None:
    session = relay(EngineError("no memory")).session()
    client = session.tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.InternalServerError, match=r"answered 503.*no memory"):
        await client.chat.completions.create(model="x", messages=USER)
    assert [p.kind for p in session.problems] == [FailureKind.ENGINE]
    assert session.calls == ()


async def test_an_endpoint_that_fails_in_mid_stream(relay: Any) -> None:
    relayed = relay("abc" * 30, engine={"seconds_per_token": 0.05})
    session = relayed.session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    stream = await client.chat.completions.create(model="x", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="was closed"):
        async for _ in stream:
            relayed.foreign.engine.close()
    assert session.calls == ()


async def test_the_endpoints_own_refusal_is_passed_on(relay: Any) -> None:
    session = relay("a", engine={"max_context": 21}).session()
    client = session.tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError, match="limit is 21") as caught:
        await client.chat.completions.create(model="x", messages=USER)
    assert caught.value.code == "context_length_exceeded"


async def test_a_key_the_endpoint_refuses(relay: Any) -> None:
    relayed = relay("a")
    relayed.foreign.sessions[0].close()
    client = relayed.session().tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError, match="api_key_env") as caught:
        await client.chat.completions.create(model="x", messages=USER)
    assert caught.value.code == "endpoint_refused_key"


async def test_without_a_key_none_is_sent(relay: Any) -> None:
    url = relay("a").foreign.server.base_url
    session = RelayServer(url, "m", "").open_session(SessionSpec("e1"))
    with pytest.raises(openai.BadRequestError, match="No API key in the request"):
        await ask_once(session)


async def ask_once(session: Session) -> None:
    client = session.tuner.as_raw_openai_sdk_client()
    await client.chat.completions.create(model="x", messages=USER)


async def test_nobody_at_the_endpoint() -> None:
    server = RelayServer("http://127.0.0.1:9/v1", "m", "k")
    session = server.open_session(SessionSpec("e1"))
    client = session.tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.InternalServerError, match="could not be reached"):
        await client.chat.completions.create(model="x", messages=USER)


async def test_a_slow_endpoint(relay: Any) -> None:
    relayed = relay("a", engine={"seconds_per_token": 60.0}, call_timeout=0.3)
    session = relayed.session()
    client = session.tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.InternalServerError, match=r"within 0\.3 s") as caught:
        await asyncio.wait_for(client.chat.completions.create(model="x", messages=USER), 20)
    assert caught.value.code == "engine_timeout"
    await relayed.foreign.until(lambda: relayed.foreign.engine.active == 0)


async def test_a_client_that_leaves(relay: Any) -> None:
    relayed = relay([97] * 50, engine={"seconds_per_token": 0.05})
    session = relayed.session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    stream = await client.chat.completions.create(model="x", messages=USER, stream=True)
    await asyncio.wait_for(anext(stream), 10)
    await stream.close()
    await relayed.foreign.until(lambda: relayed.foreign.engine.active == 0)
    assert relayed.foreign.engine.cancelled == 1
    assert session.calls == ()


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_are_passed_on_as_chat(relay: Any, stream: bool) -> None:
    relayed = relay(f"<think>hm</think>see {CALL}", "done")
    session = relayed.session(sampling=sampling(max_tokens=500))
    client = session.tuner.as_raw_openai_sdk_client()
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    answer: Any = await client.responses.create(model="x", input="hi", tools=tools, stream=stream)
    if stream:
        answer = [event async for event in answer][-1].response
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    assert answer.usage.input_tokens == 139
    result: Any = {"type": "function_call_output", "call_id": "call_0", "output": "1"}
    last = await client.responses.create(
        model="x", input=[result], tools=tools, previous_response_id=answer.id
    )
    assert last.output_text == "done"
    assert [m["role"] for m in relayed.asked["messages"]] == ["user", "assistant", "tool"]
    assert [c.response["content"] for c in session.calls] == ["see", "done"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask_token_ids", [False, True])
async def test_messages_are_passed_on_as_chat(
    relay: Any, stream: bool, ask_token_ids: bool
) -> None:
    relayed = relay(f"see {CALL}", ask_token_ids=ask_token_ids)
    session = relayed.session(sampling=sampling(max_tokens=500))
    client = session.tuner.as_raw_anthropic_sdk_client()
    tool = {"name": "add", "input_schema": {"type": "object"}}
    request: Any = {"model": "x", "max_tokens": 90, "messages": USER, "tools": [tool]}
    if stream:
        async with client.messages.stream(**request) as events:
            answer: Any = await events.get_final_message()
    else:
        answer = await client.messages.create(**request)
    assert [b.type for b in answer.content] == ["text", "tool_use"]
    assert (answer.stop_reason, answer.content[1].input) == ("tool_use", {"a": 1})
    assert answer.usage.output_tokens == len(reply(f"see {CALL}"))
    options = {"include_usage": True} | ({"continuous_usage_stats": True} if ask_token_ids else {})
    assert relayed.asked.get("stream_options") == (options if stream else None)
    (call,) = session.calls
    assert len(call.completion_ids) == (len(reply(f"see {CALL}")) if ask_token_ids else 0)


async def test_the_relay_refuses_in_the_dialects_shape(relay: Any) -> None:
    session = relay(EngineError("no memory")).session()
    client = session.tuner.as_raw_anthropic_sdk_client()
    ask = client.messages
    messages: Any = USER
    with pytest.raises(anthropic.InternalServerError, match="no memory"):
        await ask.create(model="x", max_tokens=9, messages=messages)
    with pytest.raises(anthropic.NotFoundError, match="count_tokens"):
        await ask.count_tokens(model="x", messages=messages)
