"""What /v1/chat/completions answers and records, asked by the unmodified openai SDK."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from astuner.chat.byte_codec import END, ids

from .tuner_world import CALL, PROMPT, TOOLS, USER, Make, reply, sampling


async def test_an_answer_and_its_record(make: Make) -> None:
    world = make("hello", logprob=lambda token: -token / 1000, weight_version=7)
    session = world.session(seed=3, sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client("solver", "policy")
    answer = await client.chat.completions.create(model="gpt-4", messages=USER)

    assert answer.id == "chatcmpl-e1:0"
    assert (answer.object, answer.model) == ("chat.completion", "astuner")
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None

    (call,) = session.calls
    assert call.prompt_ids.tolist() == PROMPT == list(world.engine.prompts[0])
    assert call.completion_ids.tolist() == [104, 101, 108, 108, 111, 257]
    assert call.logprobs.tolist() == pytest.approx([-0.104, -0.101, -0.108, -0.108, -0.111, -0.257])
    assert call.weight_versions.tolist() == [7] * 6
    assert (call.call_id, call.episode_id) == ("e1:0", "e1")
    assert (call.agent_name, call.target_tag) == ("solver", "policy")
    assert (call.finish_reason, call.parent_id, call.new_timeline_reason) == ("stop", None, "first")
    assert call.request == {"messages": USER, "model": "gpt-4"}
    assert call.response == {"role": "assistant", "content": "hello"}
    assert call.started_at <= call.ended_at
    assert session.counters == {"calls": 1}


async def test_usage_counts_cached_tokens(make: Make) -> None:
    world = make("hello", prefill_cached=5)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == len(PROMPT) == 21
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 27)
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert world.sessions[0].calls[0].prefill_cached == 5


async def test_the_next_turn_extends_the_sampled_tokens(make: Make) -> None:
    world = make("yes", "no")
    client = world.tuner.as_raw_openai_sdk_client()
    first = await client.chat.completions.create(model="", messages=USER)
    history: list[Any] = [*USER, first.choices[0].message.model_dump(exclude_none=True)]
    history.append({"role": "user", "content": "sure"})
    await client.chat.completions.create(model="", messages=history)
    one, two = world.sessions[0].calls
    assert two.prompt_ids.tolist() == PROMPT + ids("yes⟧\n⟦user\nsure⟧\n⟦assistant\n")
    assert (two.parent_id, two.new_timeline_reason) == (one.call_id, None)


async def test_agents_do_not_share_their_history(make: Make) -> None:
    world = make("yes")
    for agent in ("a", "b"):
        client = world.tuner.as_raw_openai_sdk_client(agent)
        messages: Any = [*USER, {"role": "assistant", "content": "yes"}, *USER]
        await client.chat.completions.create(model="", messages=USER if agent == "a" else messages)
    assert world.sessions[0].calls[1].parent_id is None


async def test_tool_calls_come_back_parsed(make: Make) -> None:
    world = make(f"let me see {CALL}", "2")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER, tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "let me see")
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function" and call.id == "call_0"
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
    assert world.sessions[0].calls[0].completion_ids.tolist() == reply(f"let me see {CALL}")

    result: Any = {"role": "tool", "tool_call_id": "call_0", "content": "2"}
    history: list[Any] = [*USER, choice.message.model_dump(exclude_none=True), result]
    await client.chat.completions.create(model="", messages=history, tools=TOOLS)
    assert world.sessions[0].calls[1].parent_id == "e1:0"


async def test_a_lone_tool_call_has_null_content(make: Make) -> None:
    client = make(CALL).tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER, tools=TOOLS)
    assert answer.choices[0].message.content is None


@pytest.mark.parametrize(
    ("choice", "text", "unmet"),
    [
        ("auto", "plain", 0),
        ("required", "plain", 1),
        ("required", CALL, 0),
        ({"type": "function", "function": {"name": "add"}}, "plain", 1),
        ({"type": "function", "function": {"name": "add"}}, CALL, 0),
    ],
)
async def test_a_tool_choice_is_asked_for_and_counted_when_unmet(
    make: Make, choice: Any, text: str, unmet: int
) -> None:
    world = make(text)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(
        model="", messages=USER, tools=TOOLS, tool_choice=choice
    )
    assert bool(answer.choices[0].message.tool_calls) == (text == CALL)
    assert world.sessions[0].counters.get("tool_choice_unmet", 0) == unmet


async def test_one_tool_call_at_a_time_is_counted_when_unmet(make: Make) -> None:
    world = make(CALL + CALL)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(
        model="", messages=USER, tools=TOOLS, parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls or ()) == 2
    assert world.sessions[0].counters["tool_choice_unmet"] == 1


async def test_tool_choice_none_hides_the_tools(make: Make) -> None:
    world = make(CALL)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(
        model="", messages=USER, tools=TOOLS, tool_choice="none"
    )
    assert world.engine.prompts == [tuple(PROMPT)]
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None


async def test_n_choices_are_calls_of_their_own(make: Make) -> None:
    world = make("a", "b", "c")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, "a"), (1, "b"), (2, "c")]
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (21, 6)
    calls = world.sessions[0].calls
    assert [c.completion_ids.tolist() for c in calls] == [[97, END], [98, END], [99, END]]
    assert [c.call_id for c in calls] == ["e1:0", "e1:1", "e1:2"]
    assert len({p.seed for p in world.engine.params}) == 3


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
async def test_a_stop_string_cuts_the_text_and_cancels_the_engine(
    make: Make, chunk_tokens: int
) -> None:
    world = make("one\nObservation: two", chunk_tokens=chunk_tokens)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER, stop=["\nObs", "zzz"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one", "stop")
    (call,) = world.sessions[0].calls
    assert call.completion_ids.tolist() == ids("one\nObs")
    assert (len(call.logprobs), len(call.weight_versions)) == (7, 7)
    assert (call.finish_reason, call.response["content"]) == ("stop", "one")
    if chunk_tokens < 100:
        assert (world.engine.cancelled, world.engine.finished) == (1, 0)


async def test_a_turn_after_a_stop_string_still_extends(make: Make) -> None:
    world = make("one\nObservation: two", "ok")
    client = world.tuner.as_raw_openai_sdk_client()
    await client.chat.completions.create(model="", messages=USER, stop="\nObs")
    history: Any = [*USER, {"role": "assistant", "content": "one"}, *USER]
    await client.chat.completions.create(model="", messages=history)
    two = world.sessions[0].calls[1]
    assert two.parent_id == "e1:0"
    assert two.prompt_ids.tolist() == PROMPT + ids("one\nObs⟧\n⟦user\nhi⟧\n⟦assistant\n")


async def test_logprobs_of_every_sampled_token(make: Make) -> None:
    world = make("é", logprob=-0.25)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(
        model="", messages=USER, logprobs=True, top_logprobs=2
    )
    rows = (answer.choices[0].logprobs and answer.choices[0].logprobs.content) or []
    assert [r.logprob for r in rows] == [-0.25, -0.25, -0.25]
    assert [r.bytes for r in rows] == [None, None, list(b"<|im_end|>")]
    assert [r.token for r in rows] == ["\ufffd", "\ufffd", "<|im_end|>"]
    assert [t.logprob for t in rows[0].top_logprobs] == [-0.25, -1.25]
    assert world.engine.params[0].top_logprobs == 2


async def test_reasoning_is_a_field_of_its_own(make: Make) -> None:
    world = make("<think>hm</think>42")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER)
    message = answer.choices[0].message.model_dump()
    assert (message["content"], message["reasoning_content"]) == ("42", "hm")


async def test_a_stop_string_in_the_reasoning(make: Make) -> None:
    world = make("<think>a STOP b</think>42")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER, stop="STOP")
    message = answer.choices[0].message.model_dump()
    assert (message["content"], message["reasoning_content"]) == ("", "a ")


async def test_the_runs_sampling_overrides_the_clients(make: Make) -> None:
    world = make("a")
    session = world.session(sampling=sampling(temperature=1.0, top_k=5))
    client = session.tuner.as_raw_openai_sdk_client()
    ask = client.chat.completions.create
    await ask(model="", messages=USER, temperature=0.2, top_p=0.9, seed=1)
    await ask(model="", messages=USER, temperature=1.0)
    await ask(model="", messages=USER)
    assert {(p.temperature, p.top_p, p.top_k) for p in world.engine.params} == {(1.0, 1.0, 5)}
    assert session.counters["overridden_sampling"] == 1


async def test_without_override_the_client_decides(make: Make) -> None:
    world = make("a")
    session = world.session(sampling=sampling(temperature=0.0, override=False))
    client = session.tuner.as_raw_openai_sdk_client()
    ask = client.chat.completions.create
    await ask(model="", messages=USER, temperature=0.2, top_p=0.9, seed=1, extra_body={"top_k": 7})
    await ask(model="", messages=USER)
    one, two = world.engine.params
    assert (one.temperature, one.top_p, one.top_k, one.seed) == (0.2, 0.9, 7, 1)
    assert (two.temperature, two.top_p, two.top_k) == (0.0, 1.0, 0)
    assert "overridden_sampling" not in session.counters


async def test_seeds_follow_from_session_prompt_and_occurrence(make: Make) -> None:
    seeds: list[list[int | None]] = []
    other: Any = [{"role": "user", "content": "other"}]
    for seed, order in ((1, (USER, USER, other)), (1, (other, USER, USER)), (2, (USER, USER))):
        world = make("a")
        client = world.session(seed=seed).tuner.as_raw_openai_sdk_client()
        for messages in order:
            await client.chat.completions.create(model="", messages=messages)
        seeds.append([p.seed for p in world.engine.params])
    assert seeds[0] == [seeds[1][1], seeds[1][2], seeds[1][0]]
    assert len({*seeds[0], *seeds[2]}) == 5
    assert all(s is not None and 0 <= s < 2**63 for s in seeds[0])


@pytest.mark.parametrize(
    ("asked", "spec", "expected"),
    [
        ({}, {"sampling": sampling(max_tokens=9)}, 9),
        ({"max_tokens": 4}, {"sampling": sampling(max_tokens=9)}, 4),
        ({"max_completion_tokens": 3}, {"sampling": sampling(max_tokens=9)}, 3),
        ({"max_tokens": 40}, {"sampling": sampling(max_tokens=9)}, 9),
        ({}, {"max_total_tokens": 26}, 5),
        ({}, {"sampling": sampling(max_tokens=100)}, 19),
    ],
)
async def test_max_tokens_is_the_least_of_all_limits(
    make: Make, asked: dict[str, int], spec: dict[str, Any], expected: int
) -> None:
    world = make("a", max_context=40)
    client = world.session(**spec).tuner.as_raw_openai_sdk_client()
    await client.chat.completions.create(model="", messages=USER, **asked)
    assert world.engine.params[0].max_tokens == expected


async def test_a_cut_reply_finishes_with_length(make: Make) -> None:
    world = make("hello")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(model="", messages=USER, max_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("he", "length")
    assert world.sessions[0].calls[0].finish_reason == "length"


async def test_token_ids_are_told_to_those_who_ask(make: Make) -> None:
    client = make("a").tuner.as_raw_openai_sdk_client()
    raw = await client.chat.completions.with_raw_response.create(
        model="", messages=USER, extra_body={"return_token_ids": True}
    )
    body = json.loads(raw.text if isinstance(raw.text, str) else raw.content)
    assert body["prompt_token_ids"] == PROMPT
    assert body["choices"][0]["token_ids"] == [97, END]


async def test_harmless_and_neutral_fields_are_accepted(make: Make) -> None:
    client = make("a").tuner.as_raw_openai_sdk_client()
    answer = await client.chat.completions.create(
        model="",
        messages=USER,
        user="me",
        metadata={"a": "b"},
        store=False,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
    )
    assert answer.choices[0].message.content == "a"


async def test_a_client_starts_no_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client of its own would ask in one what machine this is, before its first call."""
    started: list[str] = []
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    tuner = make("hello").tuner
    monkeypatch.setattr(threading.Thread, "start", noted)
    client = tuner.as_raw_openai_sdk_client()
    await client.chat.completions.create(model="", messages=USER)
    other = tuner.as_raw_anthropic_sdk_client()
    await other.messages.create(model="m", max_tokens=8, messages=USER)  # type: ignore[arg-type]
    assert started == []


async def test_the_engine_is_told_when_nobody_looks_before_the_end(make: Make) -> None:
    world = make("hello")
    create = world.tuner.as_raw_openai_sdk_client().chat.completions.create
    await create(model="", messages=USER)
    await create(model="", messages=USER, stop="l")
    async for _ in await create(model="", messages=USER, stream=True):
        pass
    assert [params.whole for params in world.engine.params] == [True, False, False]
