"""Tasks of a world that makes them up from a seed: only their names.

Task "train-17" is whatever the environment makes of the seed that belongs to this name, so
training and held-out tasks differ and all episodes of a task are alike. The environment is
not asked; it need not even run.
"""

from __future__ import annotations

from astuner.config.schema import TaskReaderConfig
from astuner.task_reader.reader import TaskSplits
from astuner.types import Task


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    wanted = config.environment
    return TaskSplits(
        [Task(task_id=f"train-{i}") for i in range(wanted.size)],
        [Task(task_id=f"validation-{i}") for i in range(wanted.validation_size)],
    )
