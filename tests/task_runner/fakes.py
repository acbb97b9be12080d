"""A proxy without HTTP: a session whose tuner records scripted calls."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from astuner.model_tuner import Problem, SessionSpec
from astuner.task_runner import EpisodeRunner, RunnerSettings
from astuner.types import Call, Episode, FailureKind, Task, WorkflowTask, token_ids

LIMIT = 20.0
"""Seconds after which a test that hangs is a failure."""


@dataclass
class FakeSession:
    """Session and tuner in one: `say` records a call of two prompt and two reply tokens."""

    spec: SessionSpec
    calls: list[Call] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    closed: int = 0

    @property
    def tuner(self) -> Any:
        return self

    def say(self, text: str, target: str = "default", agent: str = "default") -> str:
        if self.closed:
            raise RuntimeError("the episode has ended")
        number = len(self.calls)
        self.calls.append(
            Call(
                call_id=f"c{number}",
                episode_id=self.spec.episode_id,
                agent_name=agent,
                target_tag=target,
                prompt_ids=token_ids([1, 10 + number]),
                completion_ids=token_ids([7, 8]),
                logprobs=np.array([-0.5, -0.25], np.float32),
                weight_versions=np.zeros(2, np.int32),
                finish_reason="stop",
                request={"messages": []},
                response={"role": "assistant", "content": text},
                started_at=time.time(),
                ended_at=time.time(),
            )
        )
        return text

    def engine_fails(self, agent: str = "default") -> None:
        """Note a failure of the engine, as the proxy would, and raise like a client."""
        names, at = (agent, "default"), time.time()
        self.problems.append(
            Problem(FailureKind.ENGINE, "engine_error", 500, "Out of memory.", *names, at)
        )
        raise ConnectionError("500")

    def refuse(self) -> None:
        """The client's own mistake: noted too, but not the engine's."""
        names, at = ("default", "default"), time.time()
        self.problems.append(
            Problem(FailureKind.WORKFLOW, "invalid_api_key", 401, "Wrong key.", *names, at)
        )
        raise PermissionError("401 Wrong key.")

    def close(self) -> tuple[Call, ...]:
        self.closed += 1
        return tuple(self.calls)


@dataclass
class FakeServer:
    sessions: list[FakeSession] = field(default_factory=list)

    def open_session(self, spec: SessionSpec) -> FakeSession:
        self.sessions.append(FakeSession(spec))
        return self.sessions[-1]


NUMBERS = itertools.count()


def task(**metadata: Any) -> WorkflowTask:
    inner = Task(task_id="q0", main_query="2+3?", metadata=metadata)
    return WorkflowTask(task=inner, task_id="q0", episode_id=f"g0-e{next(NUMBERS):02d}")


def make(workflow: type, judge: Any = None, **settings: Any) -> tuple[EpisodeRunner, FakeServer]:
    server = FakeServer()
    values = {"episode_timeout": 10.0, "judge_timeout": 10.0, "grace": 0.2} | settings
    return EpisodeRunner(workflow, judge, server, RunnerSettings(**values)), server


async def run(workflow: type, judge: Any = None, **settings: Any) -> Episode:
    """One episode of a workflow."""
    runner, server = make(workflow, judge, **settings)
    try:
        episode = await runner.run(task(answer="5"), group_id="g0", seed=1, sampling=None)
    finally:
        runner.close()
    assert server.sessions[0].closed
    assert runner.live == ()
    return episode


async def until(condition: Any) -> None:
    for _ in range(int(LIMIT / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")
