"""A support agent that writes to customers; what a good reply is, only the judge knows.

There is no reward in here and no reference in the data: another model scores each reply by
a rubric (`task_judge.judge_type: llm`).
"""

from __future__ import annotations

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask


class PoliteWorkflow(Workflow):
    name: str = "polite"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        reply = await client.chat.completions.create(
            model="tuned",
            messages=[
                {"role": "system", "content": "Answer the customer and say sorry."},
                {"role": "user", "content": workflow_task.main_query},
            ],
        )
        return WorkflowOutput(metadata={"final_answer": reply.choices[0].message.content})
