"""A game for two on a tiny model: each agent is paid for the letters the other is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astuner import AstunerJob, ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tests.tiny_run import tiny_job


def early_share(text: str) -> float:
    """Of the characters before "n" in the alphabet."""
    return sum("a" <= c < "n" for c in text) / max(len(text), 1)


def late_share(text: str) -> float:
    return sum("n" <= c <= "z" for c in text) / max(len(text), 1)


async def say(tuner: ModelTuner, target: str, content: str) -> str:
    client = tuner.as_raw_openai_sdk_client(agent_name=target, target_tag=target)
    reply = await client.chat.completions.create(
        model="tuned", messages=[{"role": "user", "content": content}]
    )
    return reply.choices[0].message.content or ""


class Opposites(Workflow):
    """The same question to both; "early" is paid for early letters, "late" for late ones."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        early = await say(tuner, "early", workflow_task.main_query)
        late = await say(tuner, "late", workflow_task.main_query)
        rewards = {"early": early_share(early), "late": late_share(late)}
        return WorkflowOutput(reward=rewards, metadata={"early": early, "late": late})


class OneTrained(Opposites):
    trainable_targets: list[str] | None = ["early"]  # noqa: RUF012


def two_agent_job(
    model: Path, runs: Path, targets: dict[str, Any], workflow: type = Opposites, **trainer: Any
) -> AstunerJob:
    job = tiny_job(model, runs, workflow, **trainer)
    job.config.model.targets = targets
    return job
