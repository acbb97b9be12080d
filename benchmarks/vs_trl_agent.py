"""What `benchmarks/vs_trl.py` lets astuner tune: the quickstart's questions, one turn or five.

The reward has no meaning but is never the same for a whole group, so that every group is
trained on: a model that has not learnt yet is mostly wrong, and groups without differences
are left out here and computed all the same by others. No training in here.
"""

from __future__ import annotations

import zlib

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

FOLLOW_UPS = tuple(f"Now add {n} to it. Reply with just the number." for n in (3, 5, 2, 7))


def reward(answer: str) -> float:
    return zlib.crc32(answer.encode()) % 1000 / 1000


class OneTurn(Workflow):
    name: str = "one_turn"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        return await converse(workflow_task, tuner, ())


class FiveTurns(Workflow):
    name: str = "five_turns"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        return await converse(workflow_task, tuner, FOLLOW_UPS)


async def converse(
    task: WorkflowTask, tuner: ModelTuner, follow_ups: tuple[str, ...]
) -> WorkflowOutput:
    client = tuner.as_raw_openai_sdk_client()
    messages = []
    answer = ""
    for question in (task.main_query, *follow_ups):
        messages.append({"role": "user", "content": question})
        reply = await client.chat.completions.create(model="tuned", messages=messages)
        answer = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})
    return WorkflowOutput(reward=reward(answer))
