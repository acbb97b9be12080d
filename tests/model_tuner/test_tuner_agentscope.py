"""AgentScope's own model object over the proxy; the real thing only where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from astuner.errors import MissingDependency

from .tuner_world import Make, sampling

HERE = importlib.util.find_spec("agentscope") is not None
needs_agentscope = pytest.mark.skipif(not HERE, reason="agentscope is not installed")


def test_a_debug_model_stands_in_for_targets_that_are_not_trained(make: Make) -> None:
    world = make("a")
    world.server.start()
    session = world.session(trainable_targets=frozenset({"policy"}))
    strong = object()
    assert session.tuner.as_agentscope_model("user", "judge", debug_model=strong) is strong
    assert session.tuner.is_trainable("policy") and not session.tuner.is_trainable("judge")
    assert world.session().tuner.is_trainable("anything")


def test_without_agentscope_the_install_line_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make("a")
    world.server.start()
    for name in [n for n in sys.modules if n.split(".")[0] == "agentscope"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoAgentscope(), *sys.meta_path])
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[agentscope\]"'):
        world.tuner.as_agentscope_model(debug_model=object())


async def test_the_tuner_is_a_model_only_for_agentscope(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = make("a").tuner
    for name in [n for n in sys.modules if n.split(".")[0] == "agentscope"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_NoAgentscope(), *sys.meta_path])
    with pytest.raises(AttributeError, match="'ModelTuner' object has no attribute 'formatter'"):
        _ = tuner.formatter
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[agentscope\]"'):
        await tuner([{"role": "user", "content": "hi"}])


class _NoAgentscope:
    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "agentscope":
            raise ModuleNotFoundError("No module named 'agentscope'", name="agentscope")


@needs_agentscope
@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_of_theirs_calls_a_tool(make: Make, stream: bool) -> None:
    from agentscope_agent import ask_agent, reads_streams

    if stream and not reads_streams():
        pytest.skip("this agentscope cannot read the streams of this openai SDK")
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    world = make(call, "It is 3.", max_context=100_000)
    world.server.start()
    session = world.session(sampling=sampling(max_tokens=500))
    model = session.tuner.as_agentscope_model("solver", "policy", stream=stream)
    assert type(model).__module__.startswith("agentscope")
    assert "It is 3." in await ask_agent(model, "What is 1 + 2?")
    calls = session.close()
    assert len(calls) == 2
    assert calls[1].parent_id == calls[0].call_id
    assert {(c.agent_name, c.target_tag) for c in calls} == {("solver", "policy")}
