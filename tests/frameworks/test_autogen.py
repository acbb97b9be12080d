"""AutoGen: an AssistantAgent alone, streamed, with a bounded memory, and in a team."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, run, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "AutoGen"


def client_of(tuner: ModelTuner, agent: str = "solver", target: str = "default", **more: Any):
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    from tutorial.frameworks.autogen_agent import INFO

    endpoint = tuner.as_oai_baseurl_apikey(agent, target)
    return OpenAIChatCompletionClient(
        model=endpoint.model,
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        model_info=INFO,
        **more,
    )


def agent_of(client: Any, **more: Any) -> Any:
    from autogen_agentchat.agents import AssistantAgent

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    given = {"name": "solver", "tools": [add, multiply], "max_tool_iterations": 5}
    return AssistantAgent(**given | {"model_client": client, "system_message": SYSTEM} | more)


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.autogen_agent")
    ran = await run(example.AutoGenWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=939)]


@shows(NAME, "chat", "tools", "parallel", "streaming")
async def test_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        client = client_of(tuner)
        agent = agent_of(client, model_client_stream=True)
        events = [event async for event in agent.run_stream(task=task.main_query)]
        await client.close()
        assert sum(type(e).__name__ == "ModelClientStreamingChunkEvent" for e in events) > 10
        return events[-1].messages[-1].content

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=939)]


@shows(NAME, "chat", "memory")
async def test_an_agent_remembers() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        client = client_of(tuner)
        agent = agent_of(client)
        await agent.run(task=task.main_query)
        result = await agent.run(task="Sure?")
        await client.close()
        return result.messages[-1].content

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, None]
    assert ran.lines == [Line("solver", calls=3, trained=187, context=964)]


@shows(NAME, "chat", "compaction")
async def test_a_bounded_context() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from autogen_core.model_context import BufferedChatCompletionContext

        client = client_of(tuner)
        agent = agent_of(client, model_context=BufferedChatCompletionContext(buffer_size=3))
        await agent.run(task=task.main_query)
        result = await agent.run(task="Sure?")
        await client.close()
        return result.messages[-1].content

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, "edited_history"]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=939),
        Line("solver", calls=1, trained=14, context=898),
    ]


@shows(NAME, "chat", "multi-agent")
async def test_a_team_of_which_one_is_trained() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from autogen_agentchat.conditions import MaxMessageTermination
        from autogen_agentchat.teams import RoundRobinGroupChat

        clients = [client_of(tuner, "solver", "policy"), client_of(tuner, "critic", "critic")]
        solver = agent_of(clients[0], tools=None)
        critic = agent_of(clients[1], name="critic", system_message="Criticise.", tools=None)
        team = RoundRobinGroupChat([solver, critic], termination_condition=MaxMessageTermination(4))
        result = await team.run(task=task.main_query)
        for client in clients:
            await client.close()
        return result.messages[-1].content

    ran = await run(workflow(execute, ["policy"]), "42 and 140?", "No: 144.", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("solver", calls=2, trained=24, context=130),
        Line("critic", calls=1, trained=0, context=95, not_a_target=9),
    ]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        client = client_of(tuner, timeout=2.0, max_retries=5)
        result = await agent_of(client).run(task=task.main_query)
        await client.close()
        return result.messages[-1].content

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=939)]
    assert ran.counters["disconnected"] >= 1
