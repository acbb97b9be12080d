"""Number match: the final number of the answer equals that of the reference.

"1,000" equals "1000", "$5" equals "5.0". An answer with another number gets
`wrong_reward`, one without any gets 0.
"""

from __future__ import annotations

from astuner.config.schema import TaskJudgeConfig
from astuner.errors import DataError
from astuner.task_judge.answers import answer_text, last_number, reference, same_number
from astuner.types import WorkflowOutput, WorkflowTask


class NumberMatch:
    """1 if the last number of the text is right (see `answers.last_number`)."""

    def __init__(self, config: TaskJudgeConfig) -> None:
        self._config = config

    def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
        text = str(reference(task, self._config))
        wanted = last_number(text)
        if wanted is None:
            raise DataError(
                f"The reference answer of the task {task.task.task_id!r} holds no number: "
                f"{text[:80]!r}. "
                "Choose another astuner.task_judge.judge_type, or another answer_key."
            )
        answer = last_number(answer_text(output, self._config))
        if answer is None:
            return 0.0, False
        right = same_number(answer, wanted)
        return (1.0 if right else self._config.wrong_reward), right
