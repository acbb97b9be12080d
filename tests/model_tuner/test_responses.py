"""POST /v1/responses as the unmodified openai SDK sees it; tokens are in the dialects' test."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import openai
import pytest

from astuner.chat.byte_codec import ByteCodec, ids
from astuner.engine.fake import FakeEngine
from astuner.errors import EngineError
from astuner.model_tuner.dialects.responses_request import messages_of
from astuner.model_tuner.server import TunerServer

from .tuner_world import CALL, PROMPT, USER, Make, World, reply, sampling

ADD: Any = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object"},
    "strict": True,
}
SUB: Any = {**ADD, "name": "sub"}


def client_of(world: World, **spec: Any) -> openai.AsyncOpenAI:
    spec = {"sampling": sampling(max_tokens=500), **spec}
    return world.session(**spec).tuner.as_raw_openai_sdk_client()


async def events_of(client: openai.AsyncOpenAI, **request: Any) -> list[Any]:
    stream: Any = await client.responses.create(model="m", input="hi", stream=True, **request)
    return [event async for event in stream]


async def test_a_text_answer(make: Make) -> None:
    world = make("hello", prefill_cached=5)
    answer = await client_of(world).responses.create(
        model="gpt-5", input="hi", metadata={"run": "a"}, user="me", max_output_tokens=50
    )
    assert (answer.id, answer.object, answer.model) == ("resp_e1:0", "response", "astuner")
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.output_text, answer.metadata) == ("hello", {"run": "a"})
    assert (answer.max_output_tokens, answer.store) == (50, True)
    (item,) = answer.output
    assert (item.type, item.id, item.status) == ("message", "msg_e1:0_0", "completed")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (21, 6)
    assert answer.usage.input_tokens_details.cached_tokens == 5
    assert world.sessions[0].calls[0].prompt_ids.tolist() == PROMPT
    assert world.sessions[0].calls[0].request == {
        "model": "gpt-5",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 50,
    }


async def test_a_cut_answer_is_incomplete(make: Make) -> None:
    answer = await client_of(make("hello")).responses.create(
        model="m", input="hi", max_output_tokens=2
    )
    assert (answer.status, answer.output_text) == ("incomplete", "he")
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]


async def test_reasoning_and_parallel_calls_are_items(make: Make) -> None:
    answer = await client_of(make(f"<think>hm</think>see {CALL}{CALL}")).responses.create(
        model="m", input="hi", tools=[ADD]
    )
    assert [item.type for item in answer.output] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    reasoning, _, one, two = (item.to_dict() for item in answer.output)
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (one["call_id"], two["call_id"]) == ("call_0", "call_1")
    assert (one["name"], one["arguments"]) == ("add", '{"a": 1}')


async def test_a_lone_call_has_no_message_and_an_empty_answer_has_one(make: Make) -> None:
    client = client_of(make(CALL, ""))
    answer = await client.responses.create(model="m", input="hi", tools=[ADD])
    assert [item.type for item in answer.output] == ["function_call"]
    answer = await client.responses.create(model="m", input="hi")
    assert [item.type for item in answer.output] == ["message"] and answer.output_text == ""


async def test_the_events_of_a_stream_in_their_order(make: Make) -> None:
    events = await events_of(client_of(make(f"<think>t</think>hi {CALL}")), tools=[ADD])
    text = ("response.content_part.added", "response.output_text.delta")
    ends = ("response.content_part.done", "response.output_item.done")
    thought = ("response.reasoning_text.delta", "response.reasoning_text.done")
    arguments = "response.function_call_arguments"
    assert [e.type for e in events] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added", *thought, *ends),
        *("response.output_item.added", *text, "response.output_text.delta"),
        *("response.output_text.done", *ends),
        *("response.output_item.added", f"{arguments}.delta", f"{arguments}.done"),
        *("response.output_item.done", "response.completed"),
    ]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    items = [e.item for e in events if e.type == "response.output_item.done"]
    final = events[-1].response
    assert [i.to_dict() for i in items] == [i.to_dict() for i in final.output]
    assert [e.output_index for e in events if e.type == "response.output_item.added"] == [0, 1, 2]
    assert {e.item_id for e in events if "output_text" in e.type} == {"msg_e1:0_1"}
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert (final.usage.input_tokens, final.usage.output_tokens) == (139, len(reply(CALL)) + 19)


async def test_a_cut_stream_ends_incomplete(make: Make) -> None:
    events = await events_of(client_of(make("hello")), max_output_tokens=2)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"
    assert events[-2].item.status == "incomplete"


async def test_an_empty_stream_has_an_empty_message(make: Make) -> None:
    events = await events_of(client_of(make("")))
    assert [e.type for e in events][2:] == [
        *("response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done"),
        *("response.output_item.done", "response.completed"),
    ]


PIECES = ["</think>", "</think>", CALL, "a", "word ", " ", "<", "é", "{"]


@pytest.mark.parametrize("seed", range(20))
async def test_a_stream_amounts_to_the_whole_answer(seed: int) -> None:
    dice = random.Random(seed)
    text = "<think>" * dice.randint(0, 1) + "".join(dice.choices(PIECES, k=6))
    engine = FakeEngine([reply(text)], chunk_tokens=dice.randint(1, 9))
    world = World(engine, TunerServer(engine, ByteCodec()))
    whole = await client_of(world).responses.create(model="m", input="hi", tools=[ADD])
    streamed = (await events_of(client_of(world, episode_id="e1"), tools=[ADD]))[-1].response
    assert streamed.output_text == whole.output_text
    assert [i.to_dict() for i in streamed.output] == [i.to_dict() for i in whole.output]


async def test_logprobs_for_those_who_include_them(make: Make) -> None:
    client = client_of(make("ab", logprob=-0.25))
    include: Any = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    answer: Any = await client.responses.create(model="m", input="hi", include=include)
    assert [r.logprob for r in answer.output[0].content[0].logprobs] == [-0.25] * 3
    events = await events_of(client, include=include)
    told = [e.logprobs for e in events if e.type == "response.output_text.delta"]
    assert [[r.token for r in rows] for rows in told] == [["a"], ["b"]]


# ---------------------------------------------------------------- stored responses


async def test_instructions_are_not_carried_over(make: Make) -> None:
    world = make("yes", "no")
    client = client_of(world)
    first = await client.responses.create(model="m", input="hi", instructions="Be brief.")
    await client.responses.create(model="m", input="sure", previous_response_id=first.id)
    prompt = ids("⟦user\nhi⟧\n⟦assistant\nyes⟧\n⟦user\nsure⟧\n⟦assistant\n")
    assert world.sessions[0].calls[1].prompt_ids.tolist() == prompt


async def test_two_continuations_of_one_response(make: Make) -> None:
    world = make("yes", "a", "b")
    client = client_of(world)
    first = await client.responses.create(model="m", input="hi")
    for text in ("one", "two"):
        await client.responses.create(model="m", input=text, previous_response_id=first.id)
    assert [c.parent_id for c in world.sessions[0].calls] == [None, "e1:0", "e1:0"]


async def test_a_stored_response_can_be_read_and_deleted(make: Make) -> None:
    client = client_of(make("yes"))
    first = await client.responses.create(model="m", input="hi")
    again = await client.responses.retrieve(first.id)
    assert again.to_dict() == first.to_dict()
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="resp_e1:0"):
        await client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="not found") as caught:
        await client.responses.create(model="m", input="x", previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == (
        *("previous_response_not_found", "previous_response_id"),
    )


async def test_what_is_not_stored_or_of_another_episode_is_not_found(make: Make) -> None:
    world = make("yes")
    client = client_of(world)
    unstored = await client.responses.create(model="m", input="hi", store=False)
    stored = await client.responses.create(model="m", input="hi")
    with pytest.raises(openai.BadRequestError, match="not found"):
        await client.responses.create(model="m", input="x", previous_response_id=unstored.id)
    with pytest.raises(openai.NotFoundError):
        await client_of(world, episode_id="e2").responses.retrieve(stored.id)


async def test_agents_of_an_episode_share_stored_responses(make: Make) -> None:
    world = make("yes", "no")
    client = client_of(world)
    first = await client.responses.create(model="m", input="hi")
    other = world.sessions[0].tuner.as_raw_openai_sdk_client("critic")
    await other.responses.create(model="m", input="so", previous_response_id=first.id)
    call = world.sessions[0].calls[1]
    assert (call.agent_name, call.parent_id) == ("critic", None)
    assert call.prompt_ids.tolist() == ids("⟦user\nhi⟧\n⟦assistant\nyes⟧\n⟦user\nso⟧\n⟦assistant\n")


async def test_input_tokens_are_counted_without_a_call(make: Make) -> None:
    world = make("a")
    counted = await client_of(world).responses.input_tokens.count(model="m", input="hi")
    assert counted.input_tokens == 21
    assert (world.engine.prompts, world.sessions[0].calls) == ([], ())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            *("input[0].content[0]", "unsupported_content", "'input_image'.*reads text only"),
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            *("input[0].content[0]", "unsupported_content", "input_audio"),
        ),
        (
            {
                "input": [
                    {
                        "type": "function_call_output",
                        "call_id": "c",
                        "output": [{"type": "input_file"}],
                    }
                ]
            },
            *("input[0].output[0]", "unsupported_content", "input_file"),
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools[0]",
            "unsupported_tool",
            "only OpenAI can run",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "invalid_value", "string"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]", "unsupported_item", "web_search"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value", "robot"),
        ({"input": []}, "input", "invalid_value", "must not be empty"),
        ({"input": 3}, "input", "invalid_value", "seen: 3"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}},
            *("text.format", "unsupported_parameter", "not constrained"),
        ),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort", None, "template_kwargs"),
        ({"background": True}, "background", "unsupported_parameter", "background"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter", "previous_response_id"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter", "silently"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value", "needs `tools`"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}},
            *("tool_choice", "invalid_value", "sub"),
        ),
        ({"tools": [ADD], "tool_choice": {"type": "mcp"}}, "tool_choice", None, "mcp"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value", "seen: 0"),
        ({"foo": 1}, "foo", "unknown_parameter", "foo=1"),
    ],
)
async def test_a_bad_field_is_named(
    make: Make, fields: dict[str, Any], param: str, code: str | None, words: str
) -> None:
    world = make("a")
    body = {"model": "m", "input": "hi", **fields}
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        await client_of(world).post("/responses", body=body, cast_to=object)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert code in (None, caught.value.code)
    assert world.engine.prompts == [] and world.sessions[0].counters == {"refused": 1}


async def test_frameworks_usual_fields_are_accepted(make: Make) -> None:
    answer = await client_of(make("a")).responses.create(
        model="m",
        input=[
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            {"role": "user", "content": "hi"},
        ],
        reasoning={"summary": "auto"},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        truncation="disabled",
        service_tier="auto",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        tool_choice="auto",
        background=False,
        max_tool_calls=3,
    )
    assert answer.output_text == "a"


async def test_a_tool_choice_is_counted_when_unmet(make: Make) -> None:
    world = make("plain")
    client = client_of(world)
    ask = client.responses.create
    await ask(model="m", input="hi", tools=[ADD, SUB], tool_choice="required")
    chosen: Any = {"type": "function", "name": "sub"}
    await ask(model="m", input="hi", tools=[ADD, SUB], tool_choice=chosen)
    await ask(model="m", input="hi", tools=[ADD, SUB])
    assert world.sessions[0].counters["tool_choice_unmet"] == 2


async def test_an_engine_that_fails_before_and_in_mid_stream(make: Make) -> None:
    world = make(EngineError("out of memory"), "abc", seconds_per_token=0.05)
    client = client_of(world)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        await events_of(client)
    stream: Any = await client.responses.create(model="m", input="hi", stream=True)
    seen: list[int] = []
    with pytest.raises(openai.APIError, match="was closed"):
        async for event in stream:
            seen.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                world.engine.close()
    assert seen == list(range(len(seen))) and len(seen) >= 5
    assert world.sessions[0].calls == ()


async def test_recorded_and_stored_before_the_last_event(make: Make) -> None:
    world = make("a")
    client = client_of(world)
    stream: Any = await client.responses.create(model="m", input="hi", stream=True)
    async for event in stream:
        if event.type == "response.completed":
            assert len(world.sessions[0].calls) == 1
            assert (await client.responses.retrieve(event.response.id)).output_text == "a"
            break
    else:
        pytest.fail("it never completed")


def test_the_sync_sdk_over_loopback(make: Make) -> None:
    world = make("hi", CALL)
    world.server.start()
    session = world.session(sampling=sampling(max_tokens=500))
    client = session.tuner.as_raw_openai_sdk_client(sync=True)
    assert client.responses.create(model="m", input="hi").output_text == "hi"
    with client.responses.stream(model="m", input="hi", tools=[ADD]) as stream:
        assert "response.function_call_arguments.done" in {e.type for e in stream}
        assert stream.get_final_response().output[0].type == "function_call"
    assert len(session.calls) == 2


async def test_calls_side_by_side(make: Make) -> None:
    world = make("a")
    client = client_of(world)
    answers = await asyncio.gather(
        *(client.responses.create(model="m", input=str(i)) for i in range(20))
    )
    assert len({a.id for a in answers}) == 20 == len(world.sessions[0].calls)


# ---------------------------------------------------------------- items as messages


def test_items_that_belong_to_one_answer_become_one_message() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{not json"}
    items: list[Any] = [
        *USER,
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "see"}]},
        call,
        {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "function_call_output", "call_id": "d", "output": "2"},
        call,
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    messages = messages_of(items)
    assert [m["role"] for m in messages] == [
        *("user", "assistant", "tool", "tool", "assistant", "assistant", "assistant")
    ]
    answer = messages[1]
    assert answer["reasoning_content"] == "hm"
    assert answer["content"] == [{"type": "text", "text": "see"}]
    assert [c["id"] for c in answer["tool_calls"]] == ["c", "d"]
    assert answer["tool_calls"][0]["function"]["arguments"] == "{not json"
    assert messages[2] == {"role": "tool", "tool_call_id": "c", "content": "1"}
    assert messages[4]["tool_calls"][0]["id"] == "c" and messages[4]["content"] == ""
