"""Exact match: the answer is the reference, character by character but for the ends.

A wrong answer that has the reference's form (a bare number where a number is
wanted, any text otherwise) gets `wrong_reward`; one without the form gets 0.
"""

from __future__ import annotations

from astuner.config.schema import TaskJudgeConfig
from astuner.task_judge.answers import answer_text, lone_number, reference_text
from astuner.types import WorkflowOutput, WorkflowTask


class ExactMatch:
    """1 for the exact reference (of a worked solution, what follows its "####")."""

    def __init__(self, config: TaskJudgeConfig) -> None:
        self._config = config

    def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
        wanted = reference_text(task, self._config)
        answer = answer_text(output, self._config)
        if answer == wanted:
            return 1.0, True
        formed = bool(answer) and (lone_number(wanted) is None or lone_number(answer) is not None)
        return (self._config.wrong_reward if formed else 0.0), False
