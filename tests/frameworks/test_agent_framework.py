"""Microsoft Agent Framework: chat and Responses, streams, sessions, compaction, agents as tools."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, call, run, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "Agent Framework"
Dialect = Literal["chat", "responses"]


def client_of(tuner: ModelTuner, dialect: Dialect, agent: str = "solver", target: str = "default"):
    from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient

    endpoint = tuner.as_oai_baseurl_apikey(agent, target)
    kind = OpenAIChatCompletionClient if dialect == "chat" else OpenAIChatClient
    return kind(model=endpoint.model, base_url=endpoint.base_url, api_key=endpoint.api_key)


def agent_of(client: Any, instructions: str | None = None, **more: Any) -> Any:
    from agent_framework import Agent

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    return Agent(
        client, instructions or SYSTEM, **{"name": "solver", "tools": [add, multiply]} | more
    )


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.agent_framework_agent")
    ran = await run(example.AgentFrameworkWorkflow, *SOLVED)
    assert ran.answer == "Both at once." + DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=812)]


@shows(NAME, "responses", "tools", "parallel")
async def test_responses() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return (await agent_of(client_of(tuner, "responses")).run(task.main_query)).text

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == "Both at once." + DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=874)]


@pytest.mark.parametrize(
    "dialect",
    [
        pytest.param("chat", marks=shows(NAME, "chat", "tools", "parallel", "streaming")),
        pytest.param("responses", marks=shows(NAME, "responses", "tools", "parallel", "streaming")),
    ],
)
async def test_streaming(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(client_of(tuner, dialect))
        stream = agent.run(task.main_query, stream=True)
        texts = [update.text async for update in stream]
        assert sum(bool(text) for text in texts) > 10
        return (await stream.get_final_response()).text

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == "Both at once." + DONE
    context = {"chat": 812, "responses": 874}[dialect]
    assert ran.lines == [Line("solver", calls=2, trained=173, context=context)]


@pytest.mark.parametrize(
    "dialect",
    [
        pytest.param("chat", marks=shows(NAME, "chat", "memory")),
        pytest.param("responses", marks=shows(NAME, "responses", "memory")),
    ],
)
async def test_a_session_remembers(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(client_of(tuner, dialect))
        session = agent.create_session()
        await agent.run(task.main_query, session=session)
        return (await agent.run("Sure?", session=session)).text

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, None]
    context = {"chat": 837, "responses": 899}[dialect]
    assert ran.lines == [Line("solver", calls=3, trained=187, context=context)]


@shows(NAME, "chat", "compaction")
async def test_compaction() -> None:
    """Old turns slide out of the window: what is asked then is a new timeline."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agent_framework import SlidingWindowStrategy

        window = SlidingWindowStrategy(keep_last_groups=2)
        agent = agent_of(client_of(tuner, "chat"), compaction_strategy=window)
        session = agent.create_session()
        await agent.run(task.main_query, session=session)
        return (await agent.run("Sure?", session=session)).text

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, "edited_history"]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=812),
        Line("solver", calls=1, trained=14, context=771),
    ]


@shows(NAME, "chat", "multi-agent")
async def test_an_agent_as_a_tool_that_is_not_trained() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        helper = agent_of(
            client_of(tuner, "chat", "helper", "helper"), "Multiply.", name="helper", tools=[]
        )
        tool = helper.as_tool(name="ask_helper", description="Ask somebody who can multiply.")
        boss = agent_of(client_of(tuner, "chat", "boss", "policy"), tools=[tool])
        return (await boss.run(task.main_query)).text

    ask = call("ask_helper", task="12 * 12?")
    ran = await run(workflow(execute, ["policy"]), ask, "144", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("boss", calls=2, trained=93, context=411),
        Line("helper", calls=1, trained=0, context=46, not_a_target=4),
    ]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        import openai
        from agent_framework.openai import OpenAIChatCompletionClient

        endpoint = tuner.as_oai_baseurl_apikey("solver")
        client = openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, timeout=2.0, max_retries=5
        )
        model = OpenAIChatCompletionClient(model=endpoint.model, async_client=client)
        return (await agent_of(model).run(task.main_query)).text

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.lines == [Line("solver", calls=2, trained=173, context=812)]
    assert ran.counters["disconnected"] >= 1
