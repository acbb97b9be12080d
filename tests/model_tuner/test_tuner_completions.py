"""What /v1/completions answers and records."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from astuner.chat.byte_codec import END, ids

from .tuner_world import Make, sampling


async def test_a_text_prompt(make: Make) -> None:
    world = make("lo there")
    client = world.tuner.as_raw_openai_sdk_client("a", "t")
    answer = await client.completions.create(model="", prompt="hel")
    assert (answer.object, answer.id) == ("text_completion", "cmpl-e1:0")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("lo there", "stop")
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 9)
    (call,) = world.sessions[0].calls
    assert call.prompt_ids.tolist() == ids("hel")
    assert call.completion_ids.tolist() == [*ids("lo there"), END]
    assert (call.parent_id, call.new_timeline_reason) == (None, "raw_prompt")
    assert call.response == {"role": "assistant", "content": "lo there"}
    assert world.engine.params[0].max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ([5, 6], [(5, 6)]),
        (["a", "b"], [(97,), (98,)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ],
)
async def test_other_prompts(make: Make, prompt: Any, prompts: list[tuple[int, ...]]) -> None:
    world = make("x")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.completions.create(model="", prompt=prompt)
    assert world.engine.prompts == prompts
    assert [(c.index, c.text) for c in answer.choices] == [(i, "x") for i in range(len(prompts))]


async def test_many_prompts_with_many_choices(make: Make) -> None:
    world = make("1", "2", "3", "4")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.completions.create(model="", prompt=["a", "b"], n=2)
    assert [(c.index, c.text) for c in answer.choices] == [(i, str(i + 1)) for i in range(4)]
    assert [c.prompt_ids.tolist() for c in world.sessions[0].calls] == [[97], [97], [98], [98]]
    assert answer.usage and answer.usage.prompt_tokens == 2


async def test_a_stop_string(make: Make) -> None:
    world = make("ab|cd")
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.completions.create(model="", prompt="x", stop="|")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
    assert world.sessions[0].calls[0].completion_ids.tolist() == ids("ab|")


async def test_legacy_logprobs(make: Make) -> None:
    world = make("ab", logprob=-0.5)
    client = world.tuner.as_raw_openai_sdk_client()
    answer = await client.completions.create(model="", prompt="x", logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "<|im_end|>"]
    assert logprobs.token_logprobs == [-0.5, -0.5, -0.5]
    assert logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}, {"<|im_end|>": -0.5}]
    assert logprobs.text_offset == [0, 1, 2]


async def test_streamed_text(make: Make) -> None:
    world = make("hi yo")
    client = world.tuner.as_raw_openai_sdk_client()
    stream = await client.completions.create(
        model="",
        prompt="x",
        stream=True,
        logprobs=0,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks = [chunk async for chunk in stream]
    assert [c.choices[0].text for c in chunks[:-1]] == ["h", "i", " y", "o", ""]
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 4 + ["stop"]
    told = [c.choices[0].model_dump() for c in chunks[:-1]]
    assert [i for c in told for i in c["token_ids"]] == ids("hi yo⟧")
    assert told[0]["prompt_token_ids"] == [120]
    assert sum(len(c["logprobs"]["token_logprobs"]) for c in told) == 6
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 7
    assert len(world.sessions[0].calls) == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "none may be empty"),
        ({"prompt": []}, "none may be empty"),
        ({"prompt": [[1], []]}, "none may be empty"),
        ({"prompt": {"a": 1}}, "a list of either"),
        ({"prompt": ["a", 1]}, "a list of either"),
        ({"prompt": [-1]}, "integers from 0"),
        ({"prompt": "x", "echo": True}, "echo=True cannot be honoured"),
        ({"prompt": "x", "suffix": "y"}, "suffix='y' cannot be honoured"),
        ({"prompt": "x", "best_of": 2}, "Use `n`"),
        ({}, "prompt"),
    ],
)
async def test_refusals(make: Make, fields: dict[str, Any], words: str) -> None:
    client = make("a").tuner.as_raw_openai_sdk_client()
    with pytest.raises(openai.BadRequestError, match=words):
        await client.post("/completions", body={"model": "m", **fields}, cast_to=object)


async def test_sampling_is_the_runs_own(make: Make) -> None:
    world = make("a")
    session = world.session(sampling=sampling(max_tokens=5, temperature=0.5))
    client = session.tuner.as_raw_openai_sdk_client()
    await client.completions.create(model="", prompt="x", temperature=0.0, max_tokens=99)
    assert (world.engine.params[0].temperature, world.engine.params[0].max_tokens) == (0.5, 5)
    assert session.counters["overridden_sampling"] == 1
