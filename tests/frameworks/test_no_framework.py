"""A loop of one's own: the anthropic SDK, and JSON over HTTP."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, run, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows


@shows("Anthropic SDK", "messages", "tools", "parallel")
async def test_the_anthropic_example() -> None:
    example = importlib.import_module("tutorial.frameworks.anthropic_loop")
    ran = await run(example.AnthropicWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=579)]


@shows("Anthropic SDK", "messages", "streaming", "tools", "parallel", "memory", "multi-agent")
async def test_two_agents_stream_and_use_tools() -> None:
    """The solver's tool results are short-circuited; the critic is not trained."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from tutorial.frameworks.sums import SCHEMAS, SYSTEM, TOOLS

        async def ask(client: Any, messages: list[Any], **more: Any) -> Any:
            async with client.messages.stream(
                model="m", max_tokens=400, messages=messages, **more
            ) as events:
                assert len([text async for text in events.text_stream]) > 5
                return await events.get_final_message()

        solver = tuner.as_raw_anthropic_sdk_client("solver", "policy")
        critic = tuner.as_raw_anthropic_sdk_client("critic", "critic")
        tools = [
            {"name": s["name"], "description": s["description"], "input_schema": s["parameters"]}
            for s in SCHEMAS
        ]
        messages: list[Any] = [{"role": "user", "content": task.main_query}]
        first = await ask(solver, messages, tools=tools, system=SYSTEM)
        results = [
            {"type": "tool_result", "tool_use_id": b.id, "content": str(TOOLS[b.name](**b.input))}
            for b in first.content
            if b.type == "tool_use"
        ]
        messages.append({"role": "assistant", "content": first.content})
        messages.append({"role": "user", "content": results})
        second = await ask(solver, messages, tools=tools, system=SYSTEM)
        opinion = await ask(critic, [{"role": "user", "content": second.content[0].text}])
        messages.append({"role": "assistant", "content": second.content})
        messages.append({"role": "user", "content": opinion.content[0].text})
        return (await ask(solver, messages, tools=tools, system=SYSTEM)).content[0].text

    ran = await run(workflow(execute, ["policy"]), *SOLVED, "Are you sure?", "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.lines == [
        Line("solver", calls=3, trained=187, context=612),
        Line("critic", calls=1, trained=0, context=30, not_a_target=14),
    ]


@shows("Anthropic SDK", "messages", "memory", "compaction")
async def test_a_history_that_is_cut() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        client = tuner.as_raw_anthropic_sdk_client("solver")

        async def ask(messages: list[Any]) -> Any:
            answer = await client.messages.create(model="m", max_tokens=99, messages=messages)
            return {"role": "assistant", "content": answer.content}

        messages: list[Any] = [{"role": "user", "content": task.main_query}]
        for question in ("Sure?", "Once more."):
            messages += [await ask(messages), {"role": "user", "content": question}]
        return (await ask(messages[2:]))["content"][0].text

    ran = await run(workflow(execute), DONE, "Yes: 42, 144.", DONE)
    assert ran.answer == DONE
    assert ran.reasons == ["first", None, "edited_history"]
    assert ran.lines == [
        Line("solver", calls=2, trained=26, context=81),
        Line("solver", calls=1, trained=12, context=68),
    ]


@shows("Anthropic SDK", "messages", "retries")
async def test_a_retry_of_the_anthropic_sdk_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        import anthropic

        endpoint = tuner.as_anthropic_baseurl_apikey("solver")
        client = anthropic.AsyncAnthropic(
            base_url=endpoint.base_url, api_key=endpoint.api_key, timeout=2.0, max_retries=5
        )
        messages: Any = [{"role": "user", "content": task.main_query}]
        answer: Any = await client.messages.create(model="m", max_tokens=99, messages=messages)
        return answer.content[0].text

    ran = await run(workflow(execute), "never", DONE, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=1, trained=12, context=56)]
    assert ran.counters["disconnected"] >= 1


@shows("plain HTTP", "chat", "tools", "parallel")
async def test_the_http_example() -> None:
    example = importlib.import_module("tutorial.frameworks.plain_http")
    ran = await run(example.PlainHTTPWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=579)]


@shows("plain HTTP", "chat", "memory", "multi-agent", "compaction")
async def test_two_agents_by_hand_and_a_history_that_is_cut() -> None:
    """The critic is not trained; the solver's third question leaves the first out."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        import httpx

        async def ask(client: httpx.AsyncClient, key: str, messages: list[Any]) -> Any:
            headers = {"Authorization": f"Bearer {key}"}
            body = {"messages": messages}
            answer = await client.post("/chat/completions", json=body, headers=headers)
            return answer.json()["choices"][0]["message"]

        solver = tuner.as_oai_baseurl_apikey("solver", "policy")
        critic = tuner.as_oai_baseurl_apikey("critic", "critic")
        async with httpx.AsyncClient(base_url=solver.base_url) as client:
            messages: list[Any] = [{"role": "user", "content": task.main_query}]
            messages.append(await ask(client, solver.api_key, messages))
            doubt = await ask(client, critic.api_key, [{"role": "user", "content": DONE}])
            messages.append({"role": "user", "content": doubt["content"]})
            messages.append(await ask(client, solver.api_key, messages))
            messages = [*messages[2:], {"role": "user", "content": "Once more."}]
            return (await ask(client, solver.api_key, messages))["content"]

    replies = (DONE, "Sure?", "Yes: 42, 144.", DONE)
    ran = await run(workflow(execute, ["policy"]), *replies)
    assert ran.answer == DONE
    assert ran.reasons == ["first", "first", None, "edited_history"]
    assert ran.lines == [
        Line("solver", calls=2, trained=26, context=81),
        Line("critic", calls=1, trained=0, context=30, not_a_target=6),
        Line("solver", calls=1, trained=12, context=68),
    ]


@shows("plain HTTP", "chat", "streaming", "retries")
async def test_a_stream_by_hand_that_is_asked_again() -> None:
    """Without an SDK's header, an Idempotency-Key tells a repeated request."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        import json

        import httpx

        endpoint = tuner.as_oai_baseurl_apikey("solver")
        headers = {"Authorization": f"Bearer {endpoint.api_key}", "Idempotency-Key": "1"}
        question = {"role": "user", "content": task.main_query}
        texts: list[str] = []
        async with httpx.AsyncClient(base_url=endpoint.base_url, headers=headers) as client:
            for _ in range(2):
                answer = await client.post(
                    "/chat/completions", json={"messages": [question], "stream": True}
                )
                data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
                assert data[-1] == "[DONE]"
                deltas = [json.loads(d)["choices"][0]["delta"] for d in data[:-1]]
                texts.append("".join(delta.get("content", "") for delta in deltas))
        assert texts[0] == texts[1]
        return texts[1]

    ran = await run(workflow(execute), DONE, "another")
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=1, trained=12, context=56)]
    assert ran.counters == {"answered_again": 1}
