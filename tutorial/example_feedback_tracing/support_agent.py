"""A support agent that learns where tickets go from its users' thumbs.

The log is read by `task_reader.type: traces`, which leaves out what nobody rated and what
`from_the_app` refuses, and adds up the feedback on one ticket. The judge knows nothing but
that feedback: a reply that users liked is right, one they disliked is wrong, and one that
nobody ever tried is worth nothing.
"""

from __future__ import annotations

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from astuner.task_reader.traces import Trace


class SupportWorkflow(Workflow):
    name: str = "support"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        reply = await client.chat.completions.create(
            model="tuned", messages=workflow_task.init_messages
        )
        return WorkflowOutput(metadata={"final_answer": reply.choices[0].message.content})


class FeedbackJudge:
    """1 for a reply that users liked, 0.1 for one that they disliked, 0 for any other: so even
    a wrong desk is better than no desk."""

    def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
        answer = str(output.metadata["final_answer"]).strip()
        if answer in task.metadata["liked"]:
            return 1.0, True
        return (0.1 if answer in task.metadata["disliked"] else 0.0), False


def from_the_app(trace: Trace) -> bool:
    """Leaves out what the monitor sent."""
    return trace.record["source"] == "app"
