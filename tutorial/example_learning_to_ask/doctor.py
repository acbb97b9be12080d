"""A doctor who may ask before the diagnosis, and has to, in order to know.

A reply with a question mark is a question to the patient; any other reply is the
diagnosis and ends the visit. Guessing at once is right one time in three; the reward pays
for the right diagnosis, and a little for questions that the patient can answer.
"""

from __future__ import annotations

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.example_learning_to_ask.patient import Patient, diagnosis

SYSTEM_PROMPT = (
    "You are a doctor. It is flu (with fever), poisoning (from food) or stress (no sleep). "
    'Ask one short question at a time, such as "Any fever?". '
    "When you know, reply with just the illness."
)
MAX_QUESTIONS = 3
RIGHT, WRONG, FOR_ASKING = 1.0, 0.1, 0.1


class DoctorWorkflow(Workflow):
    name: str = "learning_to_ask"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        patient = Patient(workflow_task.metadata["illness"])
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": workflow_task.main_query},
        ]
        asked, understood = 0, 0
        while True:
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            text = reply.choices[0].message.content or ""
            if "?" not in text or asked == MAX_QUESTIONS:
                break
            asked += 1
            answer = patient.reply(text)
            understood += answer is not None
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": answer or "I do not know."},
            ]
        found = diagnosis(text)
        right = found == patient.illness
        return WorkflowOutput(
            reward=worth(found, patient.illness, asked, understood),
            is_success=right,
            metadata={"asked": asked, "understood": understood, "diagnosis": found},
            log_metrics={"questions": float(asked), "understood": float(understood)},
        )


def worth(found: str | None, illness: str, asked: int, understood: int) -> float:
    """1 for the right diagnosis, 0.1 for a wrong one, and up to 0.1 for questions that the
    patient understood, as a share of those asked."""
    share = understood / asked if asked else 0.0
    judged = 0.0 if found is None else RIGHT if found == illness else WRONG
    return judged + FOR_ASKING * share
