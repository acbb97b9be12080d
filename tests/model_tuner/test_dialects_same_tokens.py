"""One conversation with parallel tools over three dialects: the very same tokens are recorded."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from astuner.chat.byte_codec import ids
from astuner.context_tracker import build_samples
from astuner.model_tuner import ModelTuner
from astuner.model_tuner.session import call_seed, prompt_digest
from astuner.types import token_ids

from .tuner_world import Make, reply, sampling

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": SCHEMA},
}
ANSWERS = (
    '<think>two at once</think>let me see <tool_call>{"name": "add", "arguments": {"a": 1}}'
    '</tool_call><tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>',
    "3 it is",
    "bye",
)
FIRST = f"⟦system\n{json.dumps([TOOL])}⟧\n⟦system\nBe brief.⟧\n⟦user\nhi⟧\n⟦assistant\n"
PROMPTS = [ids(FIRST)]
PROMPTS.append(PROMPTS[0] + reply(ANSWERS[0]) + ids("\n⟦tool\n1⟧\n⟦tool\n2⟧\n⟦assistant\n"))
PROMPTS.append(PROMPTS[1] + reply(ANSWERS[1]) + ids("\n⟦user\nthanks⟧\n⟦assistant\n"))


async def over_chat(tuner: ModelTuner, stream: bool) -> str:
    client = tuner.as_raw_openai_sdk_client("solver", "policy")
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    text = ""
    for turn in range(3):
        if stream:
            async with client.chat.completions.stream(
                model="m", messages=messages, tools=[TOOL]
            ) as events:
                answer = (await events.get_final_completion()).choices[0].message
        else:
            whole = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
            answer = whole.choices[0].message
        text = answer.content or ""
        calls = [
            {
                "id": c.id,
                "type": "function",
                "function": {"name": c.function.name, "arguments": c.function.arguments},
            }
            for c in answer.tool_calls or ()
        ]
        messages.append({"role": "assistant", "content": text, "tool_calls": calls or None})
        for call in calls:
            result = str(json.loads(call["function"]["arguments"])["a"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if turn == 1:
            messages.append({"role": "user", "content": "thanks"})
    return text


RESPONSES_TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": SCHEMA,
    "strict": True,
}


async def over_responses(tuner: ModelTuner, stream: bool, *, stored: bool = False) -> str:
    """With the whole input each time, or with what is new and the previous response's id."""
    client = tuner.as_raw_openai_sdk_client("solver", "policy")
    new: list[Any] = [{"role": "user", "content": "hi"}]
    history: list[Any] = []
    previous: str | None = None
    text = ""
    for turn in range(3):
        history += new
        request: dict[str, Any] = {
            "model": "m",
            "instructions": "Be brief.",
            "tools": [RESPONSES_TOOL],
            "input": new if stored else history,
            "previous_response_id": previous if stored else None,
            "store": stored,
        }
        if stream:
            async with client.responses.stream(**request) as events:
                response: Any = await events.get_final_response()
        else:
            response = await client.responses.create(**request)
        history += response.output
        previous, text = response.id, response.output_text
        new = [
            {
                "type": "function_call_output",
                "call_id": item.call_id,
                "output": str(json.loads(item.arguments)["a"]),
            }
            for item in response.output
            if item.type == "function_call"
        ]
        if turn == 1:
            new = [{"role": "user", "content": [{"type": "input_text", "text": "thanks"}]}]
    return text


async def over_responses_stored(tuner: ModelTuner, stream: bool) -> str:
    return await over_responses(tuner, stream, stored=True)


CACHED = {"type": "ephemeral"}


async def over_messages(tuner: ModelTuner, stream: bool, *, thinking: bool = False) -> str:
    client = tuner.as_raw_anthropic_sdk_client("solver", "policy")
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    text = ""
    for turn in range(3):
        request: dict[str, Any] = {
            "model": "m",
            "max_tokens": 500,
            "system": [
                {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
            ],
            "tools": [{"name": "add", "description": "adds", "input_schema": SCHEMA}],
            "thinking": {"type": "adaptive"} if thinking else {"type": "disabled"},
            "messages": messages,
        }
        if stream:
            async with client.messages.stream(**request) as events:
                answer: Any = await events.get_final_message()
        else:
            answer = await client.messages.create(**request)
        assert (answer.content[0].type == "thinking") == (thinking and turn == 0)
        messages.append({"role": "assistant", "content": answer.content})
        text = "".join(block.text for block in answer.content if block.type == "text")
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": str(block.input["a"])}
            for block in answer.content
            if block.type == "tool_use"
        ]
        if turn == 1:
            results = [{"type": "text", "text": "thanks"}]
        messages.append({"role": "user", "content": results})
    return text


async def over_messages_thinking(tuner: ModelTuner, stream: bool) -> str:
    return await over_messages(tuner, stream, thinking=True)


Client = Callable[[ModelTuner, bool], Awaitable[str]]
CLIENTS: list[Client] = [
    over_chat,
    over_responses,
    over_responses_stored,
    over_messages,
    over_messages_thinking,
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client", CLIENTS, ids=lambda c: c.__name__)
async def test_the_same_tokens_whatever_the_dialect(
    make: Make, client: Client, stream: bool
) -> None:
    world = make(*ANSWERS)
    session = world.session(seed=7, sampling=sampling(max_tokens=500))
    assert await client(session.tuner, stream) == "bye"

    calls = session.close()
    assert [c.prompt_ids.tolist() for c in calls] == PROMPTS
    assert [c.completion_ids.tolist() for c in calls] == [reply(a) for a in ANSWERS]
    assert [(c.parent_id, c.new_timeline_reason) for c in calls] == [
        (None, "first"),
        ("e1:0", None),
        ("e1:1", None),
    ]
    assert session.counters == {"calls": 3}
    (sample,) = build_samples(
        calls,
        group_id="g",
        task_id="t",
        reward=1.0,
        trainable_targets=None,
        max_prompt_tokens=None,
        max_total_tokens=None,
    )
    assert sample.token_ids.tolist() == PROMPTS[2] + reply("bye")
    assert sample.num_trained == sum(len(reply(a)) for a in ANSWERS)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda c: c.__name__)
async def test_the_same_seeds_and_the_same_record_of_messages(make: Make, client: Client) -> None:
    world = make(*ANSWERS)
    session = world.session(seed=7, sampling=sampling(max_tokens=500))
    await client(session.tuner, False)
    seeds = [call_seed(7, prompt_digest(token_ids(prompt)), 0) for prompt in PROMPTS]
    assert [p.seed for p in world.engine.params] == seeds
    last = session.calls[-1].request
    assert [m["role"] for m in last["messages"]] == [
        *("system", "user", "assistant", "tool", "tool", "assistant", "user")
    ]
    assert last["tools"] == [TOOL]
