"""A runner whose episodes end as a script says, and the pieces it needs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from astuner.task_rollout import RolloutSettings
from astuner.types import Call, Episode, Failure, FailureKind, Task, WorkflowTask, token_ids

BUG = Failure(FailureKind.WORKFLOW, "execute raised KeyError: 'x'", 'File "a.py", line 3')
ENGINE_DOWN = Failure(FailureKind.ENGINE, "the engine failed", retriable=True)


def settings(**changes: Any) -> RolloutSettings:
    """Sampling is opaque to the rollout, so plain words stand in for it."""
    values: dict[str, Any] = {"sampling": "train", "val_sampling": "val", "num_repeat": 2}
    return RolloutSettings(**values | {"backoff": 0.0} | changes)


def tasks(count: int) -> list[Task]:
    return [Task(task_id=f"q{i}", main_query=f"question {i}") for i in range(count)]


def call(episode_id: str, version: int = 0, tokens: Sequence[int] = (7, 8, 9)) -> Call:
    size = len(tokens)
    return Call(
        call_id="c0",
        episode_id=episode_id,
        agent_name="default",
        target_tag="default",
        prompt_ids=token_ids([1, 2]),
        completion_ids=token_ids(tokens),
        logprobs=np.zeros(size, np.float32),
        weight_versions=np.full(size, version, np.int32),
        finish_reason="stop",
        request={"messages": []},
        response={"role": "assistant", "content": "hi"},
        started_at=1.0,
        ended_at=2.0,
    )


@dataclass
class FakeRunner:
    """Each episode takes the version when it starts, then waits for its gate if it has one."""

    outcome: Callable[[WorkflowTask, int], Failure | None] = lambda task, attempt: None
    """(task, how often this episode was run before) -> failure."""
    version: int = 0
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    """task_id -> what its episodes wait for."""
    log: list[tuple[str, int, Any]] = field(default_factory=list)
    """(episode_id, seed, sampling) in order of start."""
    active: int = 0
    peak: int = 0
    cancelled: int = 0
    threads_left_behind: int = 0
    counters: Counter[str] = field(default_factory=Counter)

    async def run(
        self, workflow_task: WorkflowTask, *, group_id: str, seed: int, sampling: Any
    ) -> Episode:
        before = sum(entry[0] == workflow_task.episode_id for entry in self.log)
        self.log.append((workflow_task.episode_id, seed, sampling))
        version = self.version
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            await asyncio.sleep(0)
            if gate := self.gates.get(workflow_task.task_id):
                await gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.active -= 1
        failure = self.outcome(workflow_task, before)
        return Episode(
            episode_id=workflow_task.episode_id,
            group_id=group_id,
            task=workflow_task.task,
            repeat_index=workflow_task.repeat_index,
            split=workflow_task.split,
            calls=(call(workflow_task.episode_id, version),),
            samples=(),
            output=None,
            reward=None if failure else 1.0,
            turn_rewards=None,
            is_success=None,
            failure=failure,
            started_at=0.0,
            ended_at=1.0,
        )

    @property
    def started(self) -> list[str]:
        return [entry[0] for entry in self.log]


async def settle() -> None:
    """Let every task of the loop run until it waits for something."""
    for _ in range(30):
        await asyncio.sleep(0)
