"""AgentScope 1.0.x: tools, streams, memory, compaction, several agents, retries, the old style."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, call, run, workflow

pytestmark = pytest.mark.frameworks_openai2
shows = pytest.mark.shows
NAME = "AgentScope 1"


def agent_of(model: Any, **more: Any) -> Any:
    from agentscope.agent import ReActAgent
    from agentscope.formatter import OpenAIChatFormatter
    from agentscope.tool import Toolkit

    from tutorial.frameworks.agentscope_v1 import add, multiply
    from tutorial.frameworks.sums import SYSTEM

    toolkit = Toolkit()
    for tool in more.pop("tools", (add, multiply)):
        toolkit.register_tool_function(tool)
    given = {"name": "solver", "sys_prompt": SYSTEM, "toolkit": toolkit}
    agent = ReActAgent(**given | {"model": model, "formatter": OpenAIChatFormatter()} | more)
    agent.set_console_output_enabled(False)
    return agent


async def answer_of(agent: Any, text: str) -> str:
    from agentscope.message import Msg

    return (await agent(Msg("user", text, "user"))).get_text_content()


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.agentscope_v1")
    ran = await run(example.ReActWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=693)]


@shows(NAME, "chat", "tools", "parallel", "streaming")
async def test_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(tuner.as_agentscope_model("solver", stream=True))
        return await answer_of(agent, task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=693)]


@shows(NAME, "chat", "memory")
async def test_an_agent_remembers() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(tuner.as_agentscope_model("solver"))
        await answer_of(agent, task.main_query)
        return await answer_of(agent, "Sure?")

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, None]
    assert ran.lines == [Line("solver", calls=3, trained=187, context=718)]


@shows(NAME, "chat", "compaction")
async def test_compaction() -> None:
    """The agent asks for a summary by a tool call, and goes on from it."""
    summary = call(
        "generate_response",
        task_overview="Two sums.",
        current_state="Solved.",
        important_discoveries="42 and 144.",
        next_steps="None.",
        context_to_preserve="None.",
    )

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.agent import ReActAgent
        from agentscope.token import CharTokenCounter

        agent = agent_of(
            tuner.as_agentscope_model("solver"),
            compression_config=ReActAgent.CompressionConfig(
                enable=True,
                agent_token_counter=CharTokenCounter(),
                trigger_threshold=700,
                keep_recent=1,
            ),
        )
        await answer_of(agent, task.main_query)
        return await answer_of(agent, "Sure?")

    ran = await run(workflow(execute), *SOLVED, summary, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, "tools_changed", "first"]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=693),
        Line("solver", calls=1, trained=221, context=2130),
        Line("solver", calls=1, trained=14, context=839),
    ]


@shows(NAME, "chat", "multi-agent")
async def test_two_agents_of_which_one_is_trained() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.message import Msg
        from agentscope.pipeline import MsgHub

        solver = agent_of(tuner.as_agentscope_model("solver", "policy"), tools=())
        critic = agent_of(
            tuner.as_agentscope_model("critic", "critic"),
            name="critic",
            sys_prompt="Criticise.",
            tools=(),
        )
        async with MsgHub([solver, critic], announcement=Msg("user", task.main_query, "user")):
            await solver()
            await critic()
            return (await solver()).get_text_content()

    ran = await run(workflow(execute, ["policy"]), "42 and 140?", "No: 144.", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("solver", calls=2, trained=24, context=135),
        Line("critic", calls=1, trained=0, context=100, not_a_target=9),
    ]


@shows(NAME, "chat", "old style")
async def test_the_tuner_itself_as_the_model() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return await answer_of(agent_of(tuner), task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("default", calls=2, trained=173, context=693)]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.model import OpenAIChatModel

        endpoint = tuner.as_oai_baseurl_apikey("solver")
        client = {"base_url": endpoint.base_url, "timeout": 2.0, "max_retries": 5}
        model = OpenAIChatModel(
            endpoint.model, endpoint.api_key, stream=False, client_kwargs=client
        )
        return await answer_of(agent_of(model), task.main_query)

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=693)]
    assert ran.counters["disconnected"] >= 1
