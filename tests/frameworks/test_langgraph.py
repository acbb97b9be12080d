"""LangChain and LangGraph: three dialects, streams, memory, compaction, sub-agents, retries."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, Line, StuckOnce, call, run, sampled, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "LangGraph"


def chat_model(tuner: ModelTuner, agent: str = "solver", target: str = "default", **more: Any):
    from langchain_openai import ChatOpenAI

    endpoint = tuner.as_oai_baseurl_apikey(agent, target)
    return ChatOpenAI(
        model=endpoint.model, base_url=endpoint.base_url, api_key=endpoint.api_key, **more
    )


def model_of(tuner: ModelTuner, dialect: str, agent: str = "solver", target: str = "default"):
    if dialect != "messages":
        return chat_model(tuner, agent, target, use_responses_api=dialect == "responses")
    from langchain_anthropic import ChatAnthropic

    endpoint = tuner.as_anthropic_baseurl_apikey(agent, target)
    return ChatAnthropic(
        model_name=endpoint.model,
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        max_tokens=400,
    )


def in_each_dialect(*features: str) -> Any:
    return pytest.mark.parametrize(
        "dialect",
        [
            pytest.param(dialect, marks=shows(NAME, dialect, *features))
            for dialect in ("chat", "responses", "messages")
        ],
    )


def agent_of(model: Any, *tools: Any, **more: Any) -> Any:
    from langchain.agents import create_agent

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    return create_agent(model, tools=tools or [add, multiply], system_prompt=SYSTEM, **more)


def asked(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def answer_of(agent: Any, text: str, **more: Any) -> str:
    return (await agent.ainvoke(asked(text), **more))["messages"][-1].text


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    example = importlib.import_module("tutorial.frameworks.langgraph_agent")
    ran = await run(example.LangGraphWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=695)]
    assert sampled(*SOLVED) == 173
    assert ran.prompts[1].endswith("⟧\n⟦tool\n42⟧\n⟦tool\n144⟧\n⟦assistant\n")


@shows(NAME, "chat", "streaming", "tools", "parallel")
async def test_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(chat_model(tuner, streaming=True))
        pieces = [
            piece.text
            async for piece, _ in agent.astream(asked(task.main_query), stream_mode="messages")
            if piece.type == "AIMessageChunk"
        ]
        assert len(pieces) > 10
        return "".join(pieces)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == "Both at once." + DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=695)]


@shows(NAME, "responses", "tools", "parallel")
async def test_responses() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(chat_model(tuner, use_responses_api=True))
        return await answer_of(agent, task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=695)]


@shows(NAME, "responses", "streaming", "tools", "parallel")
async def test_responses_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(chat_model(tuner, use_responses_api=True, streaming=True))
        return await answer_of(agent, task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=695)]


@pytest.mark.parametrize(
    "streaming",
    [
        pytest.param(False, marks=shows(NAME, "messages", "tools", "parallel")),
        pytest.param(True, marks=shows(NAME, "messages", "tools", "parallel", "streaming")),
    ],
)
async def test_anthropic(streaming: bool) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from langchain_anthropic import ChatAnthropic

        endpoint = tuner.as_anthropic_baseurl_apikey("solver")
        model: Any = ChatAnthropic(
            model_name=endpoint.model,
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            max_tokens=400,
            streaming=streaming,
        )
        return await answer_of(agent_of(model), task.main_query)

    ran = await run(workflow(execute), *SOLVED)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=695)]


@in_each_dialect("memory")
async def test_memory(dialect: str) -> None:
    """A checkpointed thread goes on: one timeline through both questions."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from langgraph.checkpoint.memory import InMemorySaver

        agent = agent_of(model_of(tuner, dialect), checkpointer=InMemorySaver())
        thread = {"configurable": {"thread_id": "1"}}
        await answer_of(agent, task.main_query, config=thread)
        return await answer_of(agent, "Sure?", config=thread)

    ran = await run(workflow(execute), *SOLVED, "Yes: 42, 144.")
    assert ran.answer == "Yes: 42, 144."
    assert ran.lines == [Line("solver", calls=3, trained=187, context=720)]
    assert ran.reasons == ["first", None, None]


@in_each_dialect("compaction")
async def test_compaction(dialect: str) -> None:
    """The summary is a call of its own; what follows it is a new timeline."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from langchain.agents.middleware import SummarizationMiddleware
        from langgraph.checkpoint.memory import InMemorySaver

        model = model_of(tuner, dialect)
        compact: Any = SummarizationMiddleware(model, trigger=("messages", 6), keep=("messages", 1))
        agent = agent_of(model, middleware=[compact], checkpointer=InMemorySaver())
        thread = {"configurable": {"thread_id": "1"}}
        await answer_of(agent, task.main_query, config=thread)
        await answer_of(agent, "Sure?", config=thread)
        return await answer_of(agent, "And again?", config=thread)

    replies = (*SOLVED, "They said 42 and 144.", "Yes.", "42 and 144, again.")
    ran = await run(workflow(execute), *replies)
    assert ran.answer == "42 and 144, again."
    assert ran.reasons == ["first", None, "first", "first", None]
    assert ran.lines == [
        Line("solver", calls=2, trained=173, context=695),
        Line("solver", calls=1, trained=22, context=3131),
        Line("solver", calls=2, trained=24, context=730 if dialect == "messages" else 737),
    ]


@in_each_dialect("multi-agent")
async def test_a_sub_agent_that_is_not_trained(dialect: str) -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        from langchain.agents import create_agent

        one = model_of(tuner, dialect, "helper", "helper")
        helper = create_agent(one, system_prompt="Multiply.")

        async def ask_helper(question: str) -> str:
            """Ask somebody who can multiply."""
            return await answer_of(helper, question)

        boss = agent_of(model_of(tuner, dialect, "boss", "policy"), ask_helper)
        return await answer_of(boss, task.main_query)

    ask = call("ask_helper", question="12 * 12?")
    ran = await run(workflow(execute, ["policy"]), ask, "144", DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("boss", calls=2, trained=97, context=350),
        Line("helper", calls=1, trained=0, context=46, not_a_target=4),
    ]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of(chat_model(tuner, timeout=2.0, max_retries=5))
        return await answer_of(agent, task.main_query)

    ran = await run(workflow(execute), "never", *SOLVED, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=173, context=695)]
    assert ran.counters["disconnected"] >= 1
    assert ran.engine.prompts[0] == ran.engine.prompts[1]
    assert ran.engine.params[0].seed == ran.engine.params[1].seed
