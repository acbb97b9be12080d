"""AgentScope 2.x: tools, streams, memory, compaction, sub-agents, retries, the old style."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, call, run, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "AgentScope 2"


def agent_of(model: Any, *tools: Any, **more: Any) -> Any:
    from agentscope.agent import Agent
    from agentscope.tool import FunctionTool, Toolkit

    from tutorial.frameworks.agentscope_v2 import ALLOWED, add, multiply
    from tutorial.frameworks.sums import SYSTEM

    functions = [FunctionTool(f, permission=ALLOWED) for f in tools or (add, multiply)]
    given = {"name": "solver", "system_prompt": SYSTEM, "toolkit": Toolkit(tools=functions)}
    return Agent(**given | {"model": model} | more)


async def answer_of(agent: Any, text: str) -> str:
    from agentscope.message import UserMsg

    return (await agent.reply(UserMsg("user", text))).get_text_content()


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.agentscope_v2")
    ran = await run(example.AgentScopeWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=859)]


@shows(NAME, "chat", "tools", "parallel", "streaming")
async def test_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.message import UserMsg

        agent = agent_of(tuner.as_agentscope_model("solver", stream=True))
        events = [event async for event in agent.reply_stream(UserMsg("user", task.main_query))]
        texts = [e.delta for e in events if type(e).__name__ == "TextBlockDeltaEvent"]
        assert len(texts) > 10
        return "".join(texts)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == "Both at once." + DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=859)]


@shows(NAME, "chat", "memory")
async def test_an_agent_remembers() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(tuner.as_agentscope_model("solver"))
        await answer_of(agent, task.main_query)
        return await answer_of(agent, "Sure?")

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, None]
    assert ran.lines == [Line("solver", calls=3, trained=187, context=884)]


@shows(NAME, "chat", "compaction")
async def test_compaction() -> None:
    """The agent asks for a summary by a tool call, and goes on from it."""
    summary = call(
        "generate_structured_output",
        task_overview="Two sums.",
        current_state="Solved.",
        important_discoveries="42 and 144.",
        next_steps="None.",
        context_to_preserve="None.",
    )

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.agent import ContextConfig

        small = ContextConfig(trigger_ratio=0.0001, reserve_ratio=0.00001, context_buffer_ratio=0)
        agent = agent_of(tuner.as_agentscope_model("solver"))
        await answer_of(agent, task.main_query)
        await agent.compress_context(small)
        return await answer_of(agent, "Sure?")

    ran = await run(workflow(execute), *SOLVED, summary, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", None, "tools_changed", "first"]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=859),
        Line("solver", calls=1, trained=230, context=3661),
        Line("solver", calls=1, trained=14, context=1005),
    ]


@shows(NAME, "chat", "multi-agent")
async def test_a_sub_agent_with_a_debug_model() -> None:
    """The helper is no target: the strong model stands in, and nothing of it is recorded."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.message import TextBlock
        from agentscope.tool import ToolChunk

        strong = tuner.as_agentscope_model("strong", "policy")
        assert tuner.as_agentscope_model("helper", "helper", debug_model=strong) is strong
        helper = agent_of(
            tuner.as_agentscope_model("helper", "helper"), name="helper", system_prompt="Multiply."
        )

        async def ask_helper(question: str) -> ToolChunk:
            """Ask somebody who can multiply."""
            return ToolChunk(content=[TextBlock(text=await answer_of(helper, question))])

        boss = agent_of(tuner.as_agentscope_model("boss", "policy"), ask_helper)
        return await answer_of(boss, task.main_query)

    ask = call("ask_helper", question="12 * 12?")
    ran = await run(workflow(execute, ["policy"]), ask, "144", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("boss", calls=2, trained=97, context=630),
        Line("helper", calls=1, trained=0, context=770, not_a_target=4),
    ]


@shows(NAME, "chat", "old style")
async def test_the_tuner_itself_as_the_model() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return await answer_of(agent_of(tuner), task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("default", calls=2, trained=173, context=859)]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    """Of AgentScope's own retries, as of those of the client it is built on."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from agentscope.credential import OpenAICredential
        from agentscope.model import OpenAIChatModel

        endpoint = tuner.as_oai_baseurl_apikey("solver")
        model = OpenAIChatModel(
            credential=OpenAICredential(api_key=endpoint.api_key, base_url=endpoint.base_url),
            model=endpoint.model,
            stream=False,
            max_retries=5,
            client_kwargs={"timeout": 2.0, "max_retries": 0},
        )
        return await answer_of(agent_of(model), task.main_query)

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=859)]
    assert ran.counters["disconnected"] >= 1
