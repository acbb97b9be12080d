"""One task in every agent framework: time per call, tokens masked and why, merge ratio.

Each example of tutorial/frameworks plays the same scripted episodes, one after the other:
four turns with two tool calls each, then the answer. The engine answers at once and the
codec writes bytes, so that what takes time is the framework and the proxy. "proxy ms" is
the time a call spends inside the proxy's app, "framework ms" the rest of the episode's
time per call, "cpu ms" the processor time of both. The merge ratio is tokens of all calls,
each as a sample of its own, over tokens of the samples made of them. It does not show a real
model's time, beside which all of this is little.

    python scripts/install.py --env frameworks -- python benchmarks/frameworks.py [--write]
    python scripts/install.py --env frameworks-openai2 -- python benchmarks/frameworks.py [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import Report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from astuner import Task, Workflow, WorkflowTask
from astuner.chat.byte_codec import ids
from astuner.engine.fake import FakeEngine
from astuner.model_tuner import SessionSampling, TunerServer
from astuner.task_runner.runner import EpisodeRunner, RunnerSettings
from astuner.types import Episode, MaskReason
from tests.frameworks.world import DONE, TASK, Codec, call

os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true"}

TURNS = [
    f"Step {n}." + call("add", a=n, b=25) + call("multiply", a=12, b=n) for n in (17, 18, 19, 20)
]
EXAMPLES = {
    "agentscope_v2": ("agentscope", "AgentScopeWorkflow"),
    "agentscope_v1": ("agentscope", "ReActWorkflow"),
    "langgraph_agent": ("langgraph", "LangGraphWorkflow"),
    "openai_agents": ("openai-agents", "OpenAIAgentsWorkflow"),
    "agent_framework_agent": ("agent-framework-core", "AgentFrameworkWorkflow"),
    "autogen_agent": ("autogen-agentchat", "AutoGenWorkflow"),
    "smolagents_agent": ("smolagents", "SmolagentsWorkflow"),
    "pydantic_ai_agent": ("pydantic-ai-slim", "PydanticAIWorkflow"),
    "crewai_crew": ("crewai", "CrewAIWorkflow"),
    "anthropic_loop": ("anthropic", "AnthropicWorkflow"),
    "plain_http": ("", "PlainHTTPWorkflow"),
}


@dataclass
class Timed:
    """The proxy's app, and the seconds spent in it."""

    app: Callable[..., Awaitable[None]]
    seconds: float = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        start = time.perf_counter()
        try:
            await self.app(scope, receive, send)
        finally:
            self.seconds += time.perf_counter() - start


def measure(workflow: type[Workflow], final: str, episodes: int) -> dict[str, str]:
    engine = FakeEngine(
        [ids(f"{reply}⟧") for reply in (*TURNS, final)], max_context=10**6, chunk_tokens=10**6
    )
    server = TunerServer(engine, Codec())
    timed: Any = Timed(server.app)
    server.app = timed
    with server:
        runner = EpisodeRunner(workflow, None, server, RunnerSettings())
        asyncio.run(run(runner, 1))  # imports and first connections
        timed.seconds, start, cpu = 0.0, time.perf_counter(), time.process_time()
        done = asyncio.run(run(runner, episodes))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    calls = sum(len(e.calls) for e in done)
    spent = {"proxy ms": timed.seconds, "framework ms": seconds - timed.seconds, "cpu ms": cpu}
    return {
        "calls": f"{calls / episodes:.0f}",
        **{name: f"{1000 * value / calls:.2f}" for name, value in spent.items()},
        **tokens(done),
    }


async def run(runner: EpisodeRunner, episodes: int) -> list[Episode]:
    task = Task(task_id="t", main_query=TASK.main_query, metadata=TASK.metadata)
    done: list[Episode] = []
    for n in range(episodes):
        given = WorkflowTask(task=task, task_id="t", episode_id=f"e{n}")
        sampling = SessionSampling(max_tokens=4000)
        done.append(await runner.run(given, group_id="g", seed=n, sampling=sampling))
        if done[-1].failure:
            raise SystemExit(f"{done[-1].failure.message}\n{done[-1].failure.traceback}")
    return done


def tokens(episodes: list[Episode]) -> dict[str, str]:
    """What became of them, in one episode."""
    calls = [c for e in episodes for c in e.calls]
    samples = [s for e in episodes for s in e.samples]
    masked: Counter[MaskReason] = Counter()
    for sample in samples:
        masked.update(sample.masked)
    alone = sum(len(c.prompt_ids) + len(c.completion_ids) for c in calls)
    anew = Counter(c.new_timeline_reason for c in calls if c.new_timeline_reason != "first")
    del anew[None]
    why = ", ".join(f"{n // len(episodes)} {reason}" for reason, n in anew.items())
    return {
        "timelines": f"{len(samples) / len(episodes):.0f}",
        "new because": why,
        "trained": f"{sum(s.num_trained for s in samples) // len(episodes)}",
        "context": f"{masked[MaskReason.CONTEXT] // len(episodes)}",
        "elsewhere": f"{masked[MaskReason.TRAINED_ELSEWHERE] // len(episodes)}",
        "merge ratio": f"{alone / sum(len(s.token_ids) for s in samples):.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", choices=EXAMPLES, help="one example of tutorial/frameworks")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    report = Report("frameworks", __doc__, write=args.write)
    table = f"With openai {version('openai').partition('.')[0]}"
    for name, (package, workflow) in EXAMPLES.items():
        if args.only not in (None, name):
            continue
        try:
            module = import_module(f"tutorial.frameworks.{name}")
        except ImportError:  # of the other environment
            continue
        final = call("final_answer", answer=DONE) if name == "smolagents_agent" else DONE
        cells = measure(getattr(module, workflow), final, args.episodes)
        cells = {"example": name, "version": version(package) if package else "", **cells}
        report.row(table, cells)


if __name__ == "__main__":
    main()
