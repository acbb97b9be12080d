"""Workflows, judges and environments in trouble: the first of two repeats is well, the second
is not."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, ClassVar

import openai

from astuner import ModelTuner, WorkflowOutput, WorkflowTask
from tests.tiny_run import EarlyLetters

BLOCKED_SECONDS = 13.0


class Troubled(EarlyLetters):
    """Well in even repeats; `trouble` in odd ones."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        output = await super().execute(workflow_task, tuner)
        if workflow_task.repeat_index % 2:
            return await self.trouble(output, tuner)
        return output

    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        raise NotImplementedError


class Raises(Troubled):
    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        return {}["no such key"]


class Blocks(Troubled):
    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        time.sleep(BLOCKED_SECONDS)
        return output


class NeverReturns(Troubled):
    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        await asyncio.Event().wait()


class WrongKey(Troubled):
    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        endpoint = tuner.as_oai_baseurl_apikey()
        client = openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="sk-my-own-key")
        await client.chat.completions.create(
            model="tuned", messages=[{"role": "user", "content": "hello"}]
        )


class ReturnsNone(Troubled):
    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        return None


class NanReward(Troubled):
    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        return WorkflowOutput(reward=math.nan)


class AlwaysRaises(EarlyLetters):
    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        raise ZeroDivisionError("my own bug")


class LeavesItToTheJudge(EarlyLetters):
    """No reward of its own; says in its metadata which repeat it was."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        await super().execute(workflow_task, tuner)
        return WorkflowOutput(metadata={"repeat": workflow_task.repeat_index})


class JudgeRaises:
    async def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> float:
        return [1.0, 0.5][output.metadata["repeat"] // 2] if _even(output) else 1 / 0


class JudgeGivesNan:
    async def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> float:
        return float(output.metadata["repeat"]) if _even(output) else math.nan


def _even(output: WorkflowOutput) -> bool:
    return output.metadata["repeat"] % 2 == 0


class Walks(EarlyLetters):
    """One call and one step, the same in all episodes."""

    action: ClassVar[str] = "walk"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        output = await super().execute(workflow_task, tuner)
        await workflow_task.gym_env.reset()
        await workflow_task.gym_env.step(self.action)
        return output


class Kills(Walks):
    action: ClassVar[str] = "kill"


class StepsOnAFloor(Troubled):
    """Odd repeats do what the floor does not bear."""

    action: ClassVar[str] = "die"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        self.env = workflow_task.gym_env
        return await super().execute(workflow_task, tuner)

    async def trouble(self, output: WorkflowOutput, tuner: ModelTuner) -> Any:
        await self.env.reset()
        await self.env.step(self.action)
        return output


class Hangs(StepsOnAFloor):
    action: ClassVar[str] = "hang"
