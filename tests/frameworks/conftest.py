"""What a passed test has shown is written down: docs/frameworks.md is made of it.

`@shows("LangGraph", "chat", "tools", "parallel")` on a test adds a line to a file in
$ASTUNER_RAN, if that is set: the framework, its version, the dialect and the features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGES = {
    "AgentScope 2": "agentscope",
    "AgentScope 1": "agentscope",
    "LangGraph": "langgraph",
    "OpenAI Agents SDK": "openai-agents",
    "Agent Framework": "agent-framework-core",
    "AutoGen": "autogen-agentchat",
    "smolagents": "smolagents",
    "pydantic-ai": "pydantic-ai-slim",
    "CrewAI": "crewai",
    "Anthropic SDK": "anthropic",
    "plain HTTP": "",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed and (folder := os.environ.get("ASTUNER_RAN")):
        for mark in item.iter_markers("shows"):
            write_down(Path(folder), item.nodeid, *mark.args)
    return report


def write_down(folder: Path, test: str, framework: str, dialect: str, *features: str) -> None:
    package = PACKAGES[framework]
    line = {
        "framework": framework,
        "version": version(package) if package else "",
        "dialect": dialect,
        "features": sorted(features),
        "test": test,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
