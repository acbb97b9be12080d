"""pydantic-ai: three dialects, streams, message history, history processors, delegation."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, call, run, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "pydantic-ai"
Dialect = Literal["chat", "responses", "messages"]


def model_of(
    tuner: ModelTuner, dialect: Dialect = "chat", agent: str = "solver", target: str = "default"
) -> Any:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if dialect == "messages":
        anthropic: Any = tuner.as_raw_anthropic_sdk_client(agent, target)
        return AnthropicModel("astuner", provider=AnthropicProvider(anthropic_client=anthropic))
    openai = OpenAIProvider(openai_client=tuner.as_raw_openai_sdk_client(agent, target))
    kind = OpenAIChatModel if dialect == "chat" else OpenAIResponsesModel
    return kind(tuner.model_name, provider=openai)


def in_each_dialect(*features: str) -> Any:
    return pytest.mark.parametrize(
        "dialect",
        [
            pytest.param(dialect, marks=shows(NAME, dialect, *features))
            for dialect in ("chat", "responses", "messages")
        ],
    )


def agent_of(model: Any, **more: Any) -> Any:
    from pydantic_ai import Agent

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    return Agent(model, **{"system_prompt": SYSTEM, "tools": [add, multiply]} | more)


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.pydantic_ai_agent")
    ran = await run(example.PydanticAIWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=787)]


@pytest.mark.parametrize(
    "dialect",
    [
        pytest.param("responses", marks=shows(NAME, "responses", "tools", "parallel")),
        pytest.param("messages", marks=shows(NAME, "messages", "tools", "parallel")),
    ],
)
async def test_other_dialects(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return (await agent_of(model_of(tuner, dialect)).run(task.main_query)).output

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=755)]


@pytest.mark.parametrize(
    "dialect",
    [
        pytest.param("chat", marks=shows(NAME, "chat", "tools", "parallel", "streaming")),
        pytest.param("responses", marks=shows(NAME, "responses", "tools", "parallel", "streaming")),
        pytest.param("messages", marks=shows(NAME, "messages", "tools", "parallel", "streaming")),
    ],
)
async def test_streaming(dialect: Dialect) -> None:
    """All events of the run are read, so that the text before a tool call ends nothing."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent, pieces, answer = agent_of(model_of(tuner, dialect)), 0, ""
        async with agent.run_stream_events(task.main_query) as events:
            async for event in events:
                pieces += type(event).__name__ == "PartDeltaEvent"
                if type(event).__name__ == "AgentRunResultEvent":
                    answer = event.result.output
        assert pieces > 10
        return answer

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    context = 787 if dialect == "chat" else 755
    assert ran.lines == [Line("solver", calls=2, trained=173, context=context)]


@in_each_dialect("memory")
async def test_a_message_history(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(model_of(tuner, dialect))
        first = await agent.run(task.main_query)
        return (await agent.run("Sure?", message_history=first.all_messages())).output

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, None]
    assert ran.lines == [
        Line("solver", calls=3, trained=187, context=812 if dialect == "chat" else 780)
    ]


@in_each_dialect("compaction")
async def test_a_history_processor(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from pydantic_ai.capabilities import ProcessHistory

        def last(messages: list[Any]) -> list[Any]:
            return messages if len(messages) < 5 else messages[-2:]

        agent = agent_of(model_of(tuner, dialect), capabilities=[ProcessHistory(last)])
        first = await agent.run(task.main_query)
        return (await agent.run("Sure?", message_history=first.all_messages())).output

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, "edited_history"]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=787 if dialect == "chat" else 755),
        Line("solver", calls=1, trained=14, context=700 if dialect == "chat" else 668),
    ]


@in_each_dialect("multi-agent")
async def test_delegation_to_one_that_is_not_trained(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        helper = agent_of(
            model_of(tuner, dialect, "helper", "helper"), system_prompt="Multiply.", tools=[]
        )

        async def ask_helper(question: str) -> str:
            """Ask somebody who can multiply."""
            return (await helper.run(question)).output

        boss = agent_of(model_of(tuner, dialect, "boss", "policy"), tools=[ask_helper])
        return (await boss.run(task.main_query)).output

    ask = call("ask_helper", question="12 * 12?")
    ran = await run(workflow(execute, ["policy"]), ask, "144", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("boss", calls=2, trained=97, context=397 if dialect == "chat" else 381),
        Line("helper", calls=1, trained=0, context=46, not_a_target=4),
    ]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        import openai
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        endpoint = tuner.as_oai_baseurl_apikey("solver")
        client = openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, timeout=2.0, max_retries=5
        )
        model = OpenAIChatModel(endpoint.model, provider=OpenAIProvider(openai_client=client))
        return (await agent_of(model).run(task.main_query)).output

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=787)]
    assert ran.counters["disconnected"] >= 1
