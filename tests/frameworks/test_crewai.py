"""CrewAI: it drops what is said beside tool calls; crews, streams, Responses, retries."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import DONE, SOLVED, FullOnce, Line, StuckOnce, call, run, sampled, workflow

pytestmark = pytest.mark.frameworks_openai2
shows = pytest.mark.shows
NAME = "CrewAI"
SILENT = call("add", a=17, b=25) + call("multiply", a=12, b=12)
"""Two tools in parallel, without a word beside them."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREWAI_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


def model_of(tuner: ModelTuner, agent: str = "solver", target: str = "default", **more: Any) -> Any:
    from crewai import LLM

    endpoint = tuner.as_oai_baseurl_apikey(agent, target)
    return LLM(
        model=endpoint.model,
        provider="openai",
        base_url=endpoint.base_url,
        api_key=endpoint.api_key,
        **more,
    )


def agent_of(model: Any, role: str = "solver", *, tools: bool = True) -> Any:
    from crewai import Agent
    from crewai.tools import tool

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    given = [tool("add")(add), tool("multiply")(multiply)] if tools else []
    return Agent(role=role, goal=SYSTEM, backstory="You like numbers.", llm=model, tools=given)


async def answer_of(*steps: tuple[Any, str]) -> str:
    """What a crew of these agents, each with its task, comes to."""
    from crewai import Crew, Task

    tasks = [Task(description=d, expected_output="the numbers", agent=a) for a, d in steps]
    crew = Crew(agents=[agent for agent, _ in steps], tasks=tasks)
    return (await crew.kickoff_async()).raw


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    """CrewAI sends tool calls back without the words beside them: a new timeline."""
    example = importlib.import_module("tutorial.frameworks.crewai_crew")
    ran = await run(example.CrewAIWorkflow, *SOLVED)
    assert ran.answer == DONE
    assert ran.reasons == ["first", "edited_history"]
    assert ran.lines == [
        Line("solver", calls=1, trained=161, context=986),
        Line("solver", calls=1, trained=12, context=1179),
    ]


@shows(NAME, "chat", "tools", "parallel")
async def test_silent_tool_calls_are_one_timeline() -> None:
    example = importlib.import_module("tutorial.frameworks.crewai_crew")
    ran = await run(example.CrewAIWorkflow, SILENT, DONE)
    assert ran.answer == DONE
    assert sampled(SILENT, DONE) == 160
    assert ran.lines == [Line("solver", calls=2, trained=160, context=1019)]


@shows(NAME, "chat", "tools", "parallel", "streaming")
async def test_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return await answer_of((agent_of(model_of(tuner, stream=True)), task.main_query))

    ran = await run(workflow(execute), SILENT, DONE)
    assert ran.answer == DONE
    assert all(call.request["stream"] for call in ran.episode.calls)
    assert ran.lines == [Line("solver", calls=2, trained=160, context=1019)]


@shows(NAME, "responses", "tools", "parallel")
async def test_responses() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return await answer_of((agent_of(model_of(tuner, api="responses")), task.main_query))

    ran = await run(workflow(execute), SILENT, DONE)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=160, context=1043)]


@shows(NAME, "chat", "multi-agent", "memory")
async def test_a_crew_of_two_of_which_one_is_trained() -> None:
    """The second task reads what the first came to."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        critic = agent_of(model_of(tuner, "critic", "critic"), "critic", tools=False)
        solver = agent_of(model_of(tuner, "solver", "policy"))
        return await answer_of((critic, "Say what is hard here."), (solver, task.main_query))

    ran = await run(workflow(execute, ["policy"]), "12 * 12 is hard.", SILENT, DONE)
    assert ran.answer == DONE
    assert ran.lines == [
        Line("critic", calls=1, trained=0, context=338, not_a_target=17),
        Line("solver", calls=2, trained=160, context=1078),
    ]
    assert "12 * 12 is hard." in ran.prompts[1]


@shows(NAME, "chat", "compaction")
async def test_a_summary_where_the_context_is_full() -> None:
    """The summary is a call of its own; what follows it is a new timeline."""

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        return await answer_of((agent_of(model_of(tuner)), task.main_query))

    summary = "<summary>17 + 25 = 42, 12 * 12 = 144</summary>"
    ran = await run(workflow(execute), SILENT, summary, DONE, engine=FullOnce)
    assert ran.answer == DONE
    assert ran.reasons == ["first"] * 3
    assert "17 + 25 = 42, 12 * 12 = 144" in ran.prompts[2]
    assert [(line.calls, line.trained) for line in ran.lines] == [
        (1, sampled(SILENT)),
        (1, sampled(summary)),
        (1, sampled(DONE)),
    ]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        model = model_of(tuner, timeout=2.0, max_retries=5)
        return await answer_of((agent_of(model), task.main_query))

    ran = await run(workflow(execute), "never", SILENT, DONE, engine=StuckOnce)
    assert ran.answer == DONE
    assert ran.lines == [Line("solver", calls=2, trained=160, context=1019)]
    assert ran.counters["disconnected"] >= 1
