"""The minimum example: one question, one answer, and the workflow's own reward.

The last number of the reply is the answer, be it the only thing said or behind a long
derivation, in \\boxed{} or not. 1 for the right one, nothing for any other.
"""

from __future__ import annotations

import re

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.example_math_agent.math_agent_simplify import reference_of, same_number

SYSTEM_PROMPT = "Solve the problem and end with the answer."


class MathWorkflow(Workflow):
    name: str = "math_agent"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        reply = await client.chat.completions.create(
            model="tuned",
            messages=[
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": workflow_task.main_query},
            ],
        )
        answer = last_number(reply.choices[0].message.content or "")
        correct = same_number(answer, reference_of(workflow_task))
        return WorkflowOutput(
            reward=float(correct), is_success=correct, metadata={"final_answer": answer}
        )


def last_number(text: str) -> str:
    """As it is written; empty where there is none."""
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return numbers[-1] if numbers else ""
