"""A doctor who may ask before the diagnosis, and has to, in order to know.

A reply with a question mark is a question to the patient; any other reply is the
diagnosis and ends the visit. Guessing at once is right one time in three, and pays nothing
even then: the reward is for a right diagnosis that the answers bear out, and a little for
questions that the patient can answer.
"""

from __future__ import annotations

from itertools import cycle

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.example_learning_to_ask.patient import Patient, diagnosis

SYSTEM_PROMPT = (
    "You are a doctor. It is flu (with fever), poisoning (from food) or stress (no sleep). "
    'Ask one short question at a time, such as "Any fever?". '
    "When you know, reply with just the illness."
)
VISITS = (
    ("Good morning, doctor.", "Any fever?", "Yes, I have a fever.", "flu"),
    ("Here I am again.", "Any fever?", "No, I have no fever.",
     "Any bad food?", "Yes, I ate bad food.", "poisoning"),
    ("It is my turn.", "Any fever?", "No, I have no fever.",
     "Any bad food?", "No, I ate nothing bad.", "stress"),
)  # fmt: skip
"""What the prompt shows, so that a small model asks at all; patient and doctor by turns."""
MAX_QUESTIONS = 3
RIGHT, FOR_ASKING = 1.0, 0.2


class DoctorWorkflow(Workflow):
    name: str = "learning_to_ask"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        patient = Patient(workflow_task.metadata["illness"])
        messages = [
            {"role": "system", "content": SYSTEM_PROMPT},
            *shown(),
            {"role": "user", "content": workflow_task.main_query},
        ]
        asked = 0
        answers: list[str] = []
        while True:
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            text = reply.choices[0].message.content or ""
            if "?" not in text or asked == MAX_QUESTIONS:
                break
            asked += 1
            answer = patient.reply(text)
            if answer is not None:
                answers.append(answer)
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": answer or "I do not know."},
            ]
        found = diagnosis(text)
        return WorkflowOutput(
            reward=worth(found, patient, asked, answers),
            is_success=found == patient.illness,
            metadata={"asked": asked, "understood": len(answers), "diagnosis": found},
            log_metrics={"questions": float(asked), "understood": float(len(answers))},
        )


def shown() -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for visit in VISITS
        for role, content in zip(cycle(("user", "assistant")), visit, strict=False)
    ]


def worth(found: str | None, patient: Patient, asked: int, answers: list[str]) -> float:
    """1 for the right diagnosis where the answers leave no other, and up to 0.2 for
    questions that the patient understood, as a share of those asked."""
    share = len(answers) / asked if asked else 0.0
    right = found == patient.illness and patient.is_clear_from(answers)
    return RIGHT * right + FOR_ASKING * share
