"""OpenAI Agents SDK: Responses and chat models, streams, sessions, handoffs, agents as tools."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, call, run, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "OpenAI Agents SDK"
Dialect = Literal["chat", "responses"]


def model_of(tuner: ModelTuner, dialect: Dialect, agent: str = "solver", target: str = "default"):
    from agents import OpenAIChatCompletionsModel, OpenAIResponsesModel

    client = tuner.as_raw_openai_sdk_client(agent, target)
    kind: Any = OpenAIChatCompletionsModel if dialect == "chat" else OpenAIResponsesModel
    return kind(model=tuner.model_name, openai_client=client)


def agent_of(model: Any, **more: Any) -> Any:
    from agents import Agent, function_tool

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    tools = [function_tool(add), function_tool(multiply)]
    return Agent(
        **{"name": "solver", "instructions": SYSTEM, "model": model, "tools": tools} | more
    )


async def answer_of(agent: Any, text: str, **more: Any) -> str:
    from agents import RunConfig, Runner

    quiet = RunConfig(tracing_disabled=True)
    return (await Runner.run(agent, text, run_config=quiet, **more)).final_output


@shows(NAME, "responses", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.openai_agents")
    ran = await run(example.OpenAIAgentsWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=858)]


@shows(NAME, "chat", "tools", "parallel")
async def test_chat() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return await answer_of(agent_of(model_of(tuner, "chat")), task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=890)]


@pytest.mark.parametrize(
    "dialect",
    [
        pytest.param("chat", marks=shows(NAME, "chat", "tools", "parallel", "streaming")),
        pytest.param("responses", marks=shows(NAME, "responses", "tools", "parallel", "streaming")),
    ],
)
async def test_streaming(dialect: Dialect) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agents import RunConfig, Runner

        quiet = RunConfig(tracing_disabled=True)
        agent = agent_of(model_of(tuner, dialect))
        result = Runner.run_streamed(agent, task.main_query, run_config=quiet)
        events = [event async for event in result.stream_events()]
        assert sum(event.type == "raw_response_event" for event in events) > 10
        return result.final_output

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    context = {"chat": 890, "responses": 858}[dialect]
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
        from agents import SQLiteSession

        agent, session = agent_of(model_of(tuner, dialect)), SQLiteSession("s")
        await answer_of(agent, task.main_query, session=session)
        return await answer_of(agent, "Sure?", session=session)

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    context = {"chat": 915, "responses": 883}[dialect]
    assert ran.lines == [Line("solver", calls=3, trained=187, context=context)]
    assert ran.reasons == ["first", None, None]


@shows(NAME, "responses", "compaction")
async def test_a_session_that_forgets() -> None:
    """With the last items only, the history is another one, and so is the timeline."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agents import SQLiteSession
        from agents.memory import SessionSettings

        agent = agent_of(model_of(tuner, "responses"))
        session = SQLiteSession("s", session_settings=SessionSettings(limit=1))
        await answer_of(agent, task.main_query, session=session)
        return await answer_of(agent, "Sure?", session=session)

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, "edited_history"]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=858),
        Line("solver", calls=1, trained=14, context=817),
    ]


@shows(NAME, "responses", "multi-agent")
async def test_a_handoff() -> None:
    """The specialist reads what the triage agent said, as context."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        solver = agent_of(model_of(tuner, "responses"))
        triage = agent_of(
            model_of(tuner, "responses", "triage"), name="triage", tools=[], handoffs=[solver]
        )
        return await answer_of(triage, task.main_query)

    ran = await run(workflow(execute), call("transfer_to_solver"), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("triage", calls=1, trained=71, context=347),
        Line("solver", calls=2, trained=173, context=974),
    ]


@shows(NAME, "chat", "multi-agent")
async def test_an_agent_as_a_tool_that_is_not_trained() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        helper = agent_of(
            model_of(tuner, "chat", "helper", "helper"), instructions="Multiply.", tools=[]
        )
        tool = helper.as_tool("ask_helper", "Ask somebody who can multiply.")
        boss = agent_of(model_of(tuner, "chat", "boss", "policy"), tools=[tool])
        return await answer_of(boss, task.main_query)

    ask = call("ask_helper", input="12 * 12?")
    ran = await run(workflow(execute, ["policy"]), ask, "144", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("boss", calls=2, trained=94, context=502),
        Line("helper", calls=1, trained=0, context=46, not_a_target=4),
    ]


@shows(NAME, "responses", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        import openai
        from agents import OpenAIResponsesModel

        endpoint = tuner.as_oai_baseurl_apikey("solver")
        client = openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, timeout=2.0, max_retries=5
        )
        model = OpenAIResponsesModel(model=endpoint.model, openai_client=client)
        return await answer_of(agent_of(model), task.main_query)

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=858)]
    assert ran.counters["disconnected"] >= 1
