"""Every example, several episodes in one process: each in a thread and event loop of its own."""

from __future__ import annotations

import importlib

import pytest

from .world import BOTH, DONE, call, run_many

shows = pytest.mark.shows
FINAL = call("final_answer", answer=DONE)


def case(
    framework: str, dialect: str, module: str, workflow: str, *numbers: int, old: bool = False
):
    """`numbers`: timelines and trained tokens of each episode."""
    marker = pytest.mark.frameworks_openai2 if old else pytest.mark.frameworks
    marks = [shows(framework, dialect, "many episodes"), marker]
    return pytest.param(module, workflow, numbers, marks=marks, id=module)


@pytest.mark.parametrize(
    ("module", "workflow", "numbers"),
    [
        case("AgentScope 2", "chat", "agentscope_v2", "AgentScopeWorkflow", 1, 173),
        case("AgentScope 1", "chat", "agentscope_v1", "ReActWorkflow", 1, 173, old=True),
        case("LangGraph", "chat", "langgraph_agent", "LangGraphWorkflow", 1, 173),
        case("OpenAI Agents SDK", "responses", "openai_agents", "OpenAIAgentsWorkflow", 1, 173),
        case("Agent Framework", "chat", "agent_framework_agent", "AgentFrameworkWorkflow", 1, 173),
        case("AutoGen", "chat", "autogen_agent", "AutoGenWorkflow", 1, 173),
        case("smolagents", "chat", "smolagents_agent", "SmolagentsWorkflow", 2, 249),
        case("pydantic-ai", "chat", "pydantic_ai_agent", "PydanticAIWorkflow", 1, 173),
        case("CrewAI", "chat", "crewai_crew", "CrewAIWorkflow", 2, 173, old=True),
        case("Anthropic SDK", "messages", "anthropic_loop", "AnthropicWorkflow", 1, 173),
        case("plain HTTP", "chat", "plain_http", "PlainHTTPWorkflow", 1, 173),
    ],
)
async def test_many_episodes(module: str, workflow: str, numbers: tuple[int, int]) -> None:
    example = importlib.import_module(f"tutorial.frameworks.{module}")
    last = FINAL if module == "smolagents_agent" else DONE
    all_ran = await run_many(getattr(example, workflow), BOTH, last)
    assert [ran.answer.removeprefix("Both at once.") for ran in all_ran] == [DONE] * 6
    assert {(len(r.lines), sum(x.trained for x in r.lines)) for r in all_ran} == {numbers}
