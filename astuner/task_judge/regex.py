"""Regex match: the pattern is found in the answer.

`{answer}` in the pattern stands for the reference, escaped. Anchor the pattern
(`^...$`) to match the whole answer; flags are written inline, e.g. `(?i)`.
"""

from __future__ import annotations

import re

from astuner.config.schema import TaskJudgeConfig
from astuner.errors import ConfigError
from astuner.task_judge.answers import answer_text, reference_text
from astuner.types import WorkflowOutput, WorkflowTask

_PLACE = "{answer}"


class RegexMatch:
    """1 if the pattern is found, else `wrong_reward` (0 for an empty answer)."""

    def __init__(self, config: TaskJudgeConfig) -> None:
        if not config.regex.pattern:
            raise ConfigError(
                "astuner.task_judge.judge_type is regex, which needs "
                "astuner.task_judge.regex.pattern, e.g. '^{answer}$'."
            )
        self._config = config

    def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
        pattern = self._config.regex.pattern
        if _PLACE in pattern:
            pattern = pattern.replace(_PLACE, re.escape(reference_text(task, self._config)))
        answer = answer_text(output, self._config)
        if re.search(pattern, answer):
            return 1.0, True
        return (self._config.wrong_reward if answer else 0.0), False
