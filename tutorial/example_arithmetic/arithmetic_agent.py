"""The quickstart's agent: one question, one answer, through the plain OpenAI SDK.

The workflow is what you would write against any OpenAI-compatible model; the
judge pays for a bare, correct number and a little for a bare, wrong one.
"""

from __future__ import annotations

import re

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask


class ArithmeticWorkflow(Workflow):
    name: str = "arithmetic"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        reply = await client.chat.completions.create(
            model="tuned",
            messages=[{"role": "user", "content": workflow_task.main_query}],
        )
        return WorkflowOutput(metadata={"final_answer": reply.choices[0].message.content})


class BareNumberJudge:
    """1 for the right number and nothing else, 0.1 for a wrong one, 0 for anything else."""

    async def compute_reward(
        self, task: WorkflowTask, output: WorkflowOutput
    ) -> tuple[float, bool]:
        answer = str(output.metadata["final_answer"]).strip()
        if answer == str(task.metadata["answer"]).strip():
            return 1.0, True
        return (0.1 if re.fullmatch(r"-?\d+", answer) else 0.0), False
