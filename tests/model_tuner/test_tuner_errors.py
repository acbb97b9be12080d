"""Every way to be refused: status, OpenAI's JSON, what the SDK raises, what is noted."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import openai
import pytest

from astuner.chat.byte_codec import ByteCodec
from astuner.errors import ContextLengthError, EngineError
from astuner.model_tuner.in_process import InProcessTransport
from astuner.types import FailureKind

from .tuner_world import USER, Make, sampling


def raw(world: Any, key: str | None = None, header: str = "authorization") -> httpx.AsyncClient:
    key = key or world.tuner._session.agent("default", "default").api_key
    value = f"Bearer {key}" if header == "authorization" else key
    transport = InProcessTransport(world.server.app)
    return httpx.AsyncClient(
        transport=transport, base_url="http://in.process/v1", headers={header: value}
    )


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": USER, **fields}


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        (chat(presence_penalty=0.5), "presence_penalty", "unsupported_parameter", "0.5 cannot"),
        (chat(frequency_penalty=-1), "frequency_penalty", "unsupported_parameter", "trained"),
        (chat(logit_bias={"7": 1}), "logit_bias", "unsupported_parameter", "bias"),
        (
            chat(response_format={"type": "json_object"}),
            "response_format",
            "unsupported_parameter",
            "ask for JSON in the prompt",
        ),
        (chat(min_p=0.1), "min_p", "unsupported_parameter", "min_p=0.1"),
        (chat(reasoning_effort="low"), "reasoning_effort", "unsupported_parameter", "template"),
        (chat(foo=1), "foo", "unknown_parameter", "foo=1 is not a parameter"),
        (chat(temperature=-1), "temperature", "invalid_value", "greater than or equal to 0"),
        (chat(n=0), "n", "invalid_value", "greater than or equal to 1"),
        (chat(max_tokens=0), "max_tokens", "invalid_value", "seen: 0"),
        (chat(stop=""), "stop[0]", "invalid_value", "at least 1 character"),
        (chat(stop=["a"] * 17), "stop", "invalid_value", "at most 16"),
        (chat(top_logprobs=2), "top_logprobs", "invalid_request", "needs logprobs"),
        ({"model": "m"}, "messages", "missing_required_parameter", "messages"),
        (chat(messages=[]), "messages", "invalid_value", "at least one message"),
        (chat(messages="hi"), "messages", "invalid_value", "messages"),
        (
            chat(messages=[{"role": "robot", "content": "x"}]),
            "messages[0].role",
            "invalid_value",
            "'robot'",
        ),
        (chat(tools=[{"type": "x"}]), "tools[0]", "invalid_value", "function"),
        (chat(tools=[{"type": "function", "function": {}}]), "tools[0].function", None, "no name"),
        (chat(tool_choice="required"), "tool_choice", "invalid_value", "needs `tools`"),
        (
            chat(
                tools=[{"type": "function", "function": {"name": "add"}}],
                tool_choice={"type": "function", "function": {"name": "sub"}},
            ),
            "tool_choice",
            "invalid_value",
            r"'sub', but `tools` has \['add'\]",
        ),
        (
            chat(tools=[{"type": "function", "function": {"name": "add"}}], tool_choice="any"),
            "tool_choice",
            "invalid_value",
            "any.{1,2} is not",
        ),
    ],
)
async def test_a_bad_field_is_named(
    make: Make, body: dict[str, Any], param: str, code: str | None, words: str
) -> None:
    world = make("a")
    client = world.tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        await client.post("/chat/completions", body=body, cast_to=object)
    error = caught.value
    assert (error.status_code, error.param, error.type) == (400, param, "invalid_request_error")
    assert code is None or error.code == code
    session = world.sessions[0]
    assert session.calls == () and world.engine.prompts == []
    assert [(p.kind, p.status) for p in session.problems] == [(FailureKind.WORKFLOW, 400)]
    assert session.counters == {"refused": 1}


@pytest.mark.parametrize("body", [b"{", b"[1]", b"", b"\xff"])
async def test_malformed_json(make: Make, body: bytes) -> None:
    async with raw(make("a")) as client:
        response = await client.post("/chat/completions", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_json", "invalid_request_error")


async def test_nan_is_not_a_temperature(make: Make) -> None:
    async with raw(make("a")) as client:
        body = json.dumps(chat(temperature=math.nan)).encode()
        response = await client.post("/chat/completions", content=body)
    assert response.status_code == 400


async def test_a_wrong_key(make: Make) -> None:
    world = make("a")
    client = world.tuner.as_raw_openai_sdk_client().with_options(api_key="sk-wrong-key-entirely")
    with pytest.raises(openai.AuthenticationError, match=r"sk-wrong-key-e\.\.\.") as caught:
        await client.chat.completions.create(model="", messages=USER)
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")
    assert "entirely" not in str(caught.value)


async def test_no_key_and_the_other_header(make: Make) -> None:
    world = make("a")
    transport = InProcessTransport(world.server.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x/v1") as client:
        response = await client.post("/chat/completions", json=chat())
        assert response.status_code == 401
        assert "No API key" in response.json()["error"]["message"]
    async with raw(world, header="api-key") as client:
        assert (await client.post("/chat/completions", json=chat())).status_code == 200


async def test_after_the_episode(make: Make) -> None:
    world = make("a")
    client = world.tuner.as_raw_openai_sdk_client()
    assert world.sessions[0].close() == ()
    with pytest.raises(openai.AuthenticationError, match="Episode e1 has ended") as caught:
        await client.chat.completions.create(model="", messages=USER)
    assert caught.value.code == "episode_ended"
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"max_prompt_tokens": 20}, "21 tokens, but the limit is 20 tokens"),
        ({"max_total_tokens": 21}, "limit is 21 tokens .data.max_prompt_length"),
        ({}, "limit is 21 tokens .rollout.max_model_len"),
    ],
)
async def test_an_overlong_prompt(make: Make, spec: dict[str, Any], words: str) -> None:
    world = make("a", max_context=100 if spec else 21)
    client = world.session(**spec).tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        await client.chat.completions.create(model="", messages=USER)
    assert caught.value.code == "context_length_exceeded"
    assert world.engine.prompts == []


async def test_only_the_first_prompt_is_held_to_max_prompt_tokens(make: Make) -> None:
    world = make("a")
    client = world.session(max_prompt_tokens=21).tuner.as_raw_openai_sdk_client()
    await client.chat.completions.create(model="", messages=USER)
    history: Any = [*USER, {"role": "assistant", "content": "a"}, *USER]
    await client.chat.completions.create(model="", messages=history)
    assert len(world.sessions[0].calls) == 2


async def test_an_engine_that_knows_a_shorter_context(make: Make) -> None:
    world = make(ContextLengthError(21, 20))
    with pytest.raises(openai.BadRequestError, match="20 tokens") as caught:
        await world.tuner.as_raw_openai_sdk_client().chat.completions.create(
            model="", messages=USER
        )
    assert caught.value.code == "context_length_exceeded"
    assert world.sessions[0].problems[0].kind == FailureKind.WORKFLOW


async def test_too_many_calls_are_not_retried(make: Make) -> None:
    world = make("a")
    session = world.session(max_calls_per_agent=2)
    client = session.tuner.as_raw_openai_sdk_client("solver").with_options(max_retries=5)
    for _ in range(2):
        await client.chat.completions.create(model="", messages=USER)
    with pytest.raises(openai.PermissionDeniedError, match="made its 2 calls of episode e1") as e:
        await client.chat.completions.create(model="", messages=USER)
    assert e.value.code == "max_calls_exceeded"
    assert session.counters == {"calls": 2, "refused": 1}
    other = session.tuner.as_raw_openai_sdk_client("critic")
    await other.chat.completions.create(model="", messages=USER)
    assert len(session.calls) == 3


async def test_a_refused_call_does_not_count_against_the_limit(make: Make) -> None:
    world = make("a")
    client = world.session(max_calls_per_agent=1).tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="", messages=[])
    await client.chat.completions.create(model="", messages=USER)


@pytest.mark.parametrize("error", [EngineError("no memory"), ZeroDivisionError("no memory")])
async def test_a_failing_engine_is_retried_with_the_same_seed(make: Make, error: Exception) -> None:
    world = make(error, "a")
    session = world.session()
    client = session.tuner.as_raw_openai_sdk_client().with_options(max_retries=1)
    answer = await client.chat.completions.create(model="", messages=USER)
    assert answer.choices[0].message.content == "a"
    (problem,) = session.problems
    assert (problem.kind, problem.code, problem.status) == (FailureKind.ENGINE, "engine_error", 503)
    assert "no memory" in problem.message and problem.agent_name == "default"
    assert session.counters == {"engine_errors": 1, "calls": 1}
    first, second = world.engine.params
    assert first.seed == second.seed


async def test_a_closed_engine_is_not_retried(make: Make) -> None:
    world = make("a")
    world.engine.close()
    client = world.tuner.as_raw_openai_sdk_client().with_options(max_retries=5)
    with pytest.raises(openai.InternalServerError, match="was closed") as caught:
        await client.chat.completions.create(model="", messages=USER)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_closed")
    assert len(world.sessions[0].problems) == 1


async def test_the_deadline_of_a_call(make: Make) -> None:
    world = make("a", call_timeout=0.5, seconds_per_token=60.0)
    client = world.tuner.as_raw_openai_sdk_client().with_options(max_retries=5)
    with pytest.raises(openai.InternalServerError, match=r"within 0\.5 s") as caught:
        await asyncio.wait_for(client.chat.completions.create(model="", messages=USER), 20)
    assert (caught.value.status_code, caught.value.code) == (504, "engine_timeout")
    assert world.sessions[0].problems[0].kind == FailureKind.TIMEOUT
    assert (world.engine.active, world.engine.cancelled) == (0, 1)
    assert world.sessions[0].calls == ()


async def test_one_failing_choice_cancels_the_others(make: Make) -> None:
    slow = [97] * 50
    world = make(slow, EngineError("odd"), seconds_per_token=0.1)
    client = world.session(sampling=sampling()).tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.InternalServerError, match="odd"):
        await client.chat.completions.create(model="", messages=USER, n=2)
    assert (world.engine.active, world.engine.cancelled) == (0, 1)
    assert world.sessions[0].calls == ()


async def test_wrong_paths_and_methods(make: Make) -> None:
    async with raw(make("a")) as client:
        missing = await client.post("/nothing", json={})
        wrong = await client.get("/chat/completions")
        unknown = await client.get("/models/gpt-4")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "ends with /v1" in missing.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_problems_do_not_pile_up(make: Make) -> None:
    world = make("a")
    async with raw(world) as client:
        for _ in range(105):
            await client.post("/chat/completions", json={})
    assert len(world.sessions[0].problems) == 100
    assert world.sessions[0].counters["refused"] == 105


async def test_a_bug_of_ours_is_told_and_noted(make: Make, monkeypatch: Any) -> None:
    world = make("a")

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(ByteCodec, "parse", broken)
    client = world.tuner.as_raw_openai_sdk_client().with_options(max_retries=5)
    with pytest.raises(openai.InternalServerError, match=r"A bug in astuner.*oops") as caught:
        await client.chat.completions.create(model="", messages=USER)
    assert caught.value.code == "internal_error"
    assert [(p.kind, p.status) for p in world.sessions[0].problems] == [(FailureKind.ENGINE, 500)]
    assert (world.sessions[0].calls, world.sessions[0].in_flight) == ((), 0)
