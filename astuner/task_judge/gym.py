"""Tasks of reasoning-gym, scored by the package's own scorers.

The task reader left generator, params and entry in the task's metadata. Scores
run from 0 to 1; only a full score is a success, and an answer that scores less
than `wrong_reward` gets that.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from astuner.config.schema import TaskJudgeConfig
from astuner.errors import DataError, MissingDependency
from astuner.task_judge.answers import answer_text, final_part
from astuner.types import WorkflowOutput, WorkflowTask

_FULL = 1.0 - 1e-9


class ReasoningGym:
    """The generator's `score_answer`."""

    def __init__(self, config: TaskJudgeConfig) -> None:
        try:
            import reasoning_gym  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "reasoning-gym", "reasoning-gym", "task_judge.judge_type: reasoning_gym"
            ) from error
        self._config = config

    def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
        made = task.metadata.get("reasoning_gym")
        if not isinstance(made, dict):
            raise DataError(
                f"The task {task.task.task_id!r} does not come from the reasoning_gym task reader: "
                f"its metadata has {sorted(task.metadata)}. Choose another judge_type."
            )
        answer = _final(answer_text(output, self._config))
        if not answer:
            return 0.0, False
        scorer = _scorer(made["dataset"], json.dumps(made.get("params", {}), sort_keys=True))
        value = float(scorer.score_answer(answer, entry=made["entry"]))
        return max(value, self._config.wrong_reward), value >= _FULL


def _final(text: str) -> str:
    """What stands in the last <answer>...</answer>, or after "####", or the whole text."""
    from reasoning_gym.utils import extract_answer

    return extract_answer(text) or final_part(text)


@lru_cache(maxsize=64)
def _scorer(dataset: str, params: str) -> Any:
    """A generator of the same settings; it generates nothing."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(dataset, **{**json.loads(params), "size": 1, "seed": 0})
