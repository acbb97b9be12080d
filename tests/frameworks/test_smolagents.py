"""smolagents: it retells tool calls as text, and stops code at a stop string."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from astuner import ModelTuner, WorkflowTask

from .world import BOTH, DONE, Line, StuckOnce, call, run, sampled, workflow

pytestmark = pytest.mark.frameworks
shows = pytest.mark.shows
NAME = "smolagents"
FINAL = call("final_answer", answer=DONE)


def model_of(tuner: ModelTuner, agent: str = "solver", target: str = "default", **client: Any):
    from smolagents import OpenAIModel

    endpoint = tuner.as_oai_baseurl_apikey(agent, target)
    return OpenAIModel(
        endpoint.model,
        api_base=endpoint.base_url,
        api_key=endpoint.api_key,
        client_kwargs=client or None,
    )


def agent_of(kind: str, model: Any, **more: Any) -> Any:
    import smolagents

    from tutorial.frameworks.sums import SYSTEM, add, multiply

    tools = [smolagents.tool(add), smolagents.tool(multiply)]
    given = {"tools": tools, "instructions": SYSTEM, "verbosity_level": smolagents.LogLevel.OFF}
    return getattr(smolagents, kind)(**given | {"model": model} | more)


@shows(NAME, "chat", "tools", "parallel")
async def test_the_example() -> None:
    """Each step tells the earlier tool calls as text of its own: a timeline for each."""
    example = importlib.import_module("tutorial.frameworks.smolagents_agent")
    ran = await run(example.SmolagentsWorkflow, BOTH, FINAL)
    assert ran.answer == DONE
    assert ran.reasons == ["first", "edited_history"]
    assert ran.lines == [
        Line("solver", calls=1, trained=161, context=4490),
        Line("solver", calls=1, trained=88, context=4778),
    ]
    assert (sampled(BOTH), sampled(FINAL)) == (161, 88)


@shows(NAME, "chat", "tools", "parallel", "streaming")
async def test_streaming() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of("ToolCallingAgent", model_of(tuner), stream_outputs=True)
        steps = list(agent.run(task.main_query, stream=True))
        assert sum(type(s).__name__ == "ChatMessageStreamDelta" for s in steps) > 4
        return steps[-1].output

    ran = await run(workflow(execute), BOTH, FINAL)
    assert ran.answer == DONE
    assert [line.trained for line in ran.lines] == [161, 88]


@shows(NAME, "chat", "memory")
async def test_code_is_one_timeline() -> None:
    """Its code ends at a stop string, so that no end of turn is sampled. What smolagents adds
    to the message is rendered anew, but behind the very tokens that were sampled."""
    replies = (
        "Thought: both.\n<code>\nprint(add(17, 25), multiply(12, 12))\n</code>",
        'Thought: done.\n<code>\nfinal_answer("42 and 144.")\n</code>',
        'Thought: sure.\n<code>\nfinal_answer("Yes: 42, 144.")\n</code>',
    )

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        agent = agent_of("CodeAgent", model_of(tuner))
        agent.run(task.main_query)
        return agent.run("Sure?", reset=False)

    ran = await run(workflow(execute), *replies)
    assert ran.answer == "Yes: 42, 144."
    assert ran.reasons == ["first", "edited_history", "edited_history"]
    assert sum(len(reply) for reply in replies) == 182
    (line,) = ran.lines
    assert (line.calls, line.trained) == (3, 182)


@shows(NAME, "chat", "compaction")
async def test_a_callback_that_forgets_earlier_steps() -> None:
    """From the step on that lacks what was said before, a new timeline."""
    replies = (
        "Thought: one.\n<code>\nprint(add(17, 25))\n</code>",
        "Thought: two.\n<code>\nprint(multiply(12, 12))\n</code>",
        'Thought: done.\n<code>\nfinal_answer("42 and 144.")\n</code>',
    )

    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        def forget(step: Any, agent: Any) -> None:
            agent.memory.steps = agent.memory.steps[:1]  # this step is added to it next

        return agent_of("CodeAgent", model_of(tuner), step_callbacks=[forget]).run(task.main_query)

    ran = await run(workflow(execute), *replies)
    assert ran.answer == DONE
    assert ran.reasons == ["first", "edited_history", "edited_history"]
    assert [(line.calls, line.trained) for line in ran.lines] == [(2, 99), (1, 57)]


@shows(NAME, "chat", "multi-agent")
async def test_a_managed_agent_that_is_not_trained() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        helper = agent_of(
            "ToolCallingAgent",
            model_of(tuner, "helper", "helper"),
            name="helper",
            description="Multiplies.",
        )
        boss = agent_of(
            "ToolCallingAgent", model_of(tuner, "boss", "policy"), managed_agents=[helper]
        )
        return boss.run(task.main_query)

    ask = call("helper", task="12 * 12?")
    ran = await run(workflow(execute, ["policy"]), ask, call("final_answer", answer="144"), FINAL)
    assert ran.answer == DONE
    assert [(x.agent, x.trained, x.not_a_target) for x in ran.lines] == [
        ("boss", 77, 0),
        ("helper", 0, 80),
        ("boss", 88, 0),
    ]


@shows(NAME, "chat", "retries")
async def test_a_retry_is_one_call() -> None:
    async def execute(task: WorkflowTask, tuner: ModelTuner) -> str:
        model = model_of(tuner, timeout=2.0, max_retries=5)
        return agent_of("ToolCallingAgent", model).run(task.main_query)

    ran = await run(workflow(execute), "never", BOTH, FINAL, engine=StuckOnce)
    assert ran.answer == DONE
    assert [line.trained for line in ran.lines] == [161, 88]
    assert ran.counters["disconnected"] >= 1
