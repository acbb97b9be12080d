"""The job's tasks as verl's dataset (`data.custom_cls`), in astuner's own order.

The training set is endless: row p is the task at place p of `TaskOrder`, so that a run of
any length, its refills included, meets every place once, and verl's saved data state (how
many rows were taken) is all that a resume needs. How long a run is, is said by
`trainer.total_training_steps`. Needs `data.shuffle: false`. A row only names its task; the
agent loop reads it from the job file. Where the run gave up (`files.give_up`), taking the
next training row raises the reason in the trainer.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from astuner.backbone.spawned.files import folder_of_process, gave_up, read_job
from astuner.backbone.verl.sections import VALIDATION_FILES
from astuner.task_reader import TaskOrder
from astuner.types import Task

ENDLESS = 1_000_000_000
NO_TASK = "none"
"""The split of the one row of an empty validation set, which verl cannot load."""


class TaskDataset(Dataset[dict[str, Any]]):
    """One split of the job file of this process's folder."""

    def __init__(self, data_files: Any, *_: Any, **__: Any) -> None:
        self._folder = folder_of_process()
        job = read_job(self._folder)
        config = job.config
        self._is_train = VALIDATION_FILES not in str(data_files)
        chosen = job.tasks.validation[: config.rollout.val_kwargs.max_tasks or None]
        self._tasks = job.tasks.train if self._is_train else chosen
        self._order = TaskOrder.configured(config, len(job.tasks.train))

    def __len__(self) -> int:
        return ENDLESS if self._is_train else max(1, len(self._tasks))

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not self._is_train:
            if not self._tasks:
                return _row(Task(), NO_TASK, 0, 0)
            return _row(self._tasks[position], "validation", position, position)
        if (reason := gave_up(self._folder)) is not None:
            raise reason
        step, place = divmod(position, self._order.batch_size)
        index = self._order.indices(step)[place]
        return _row(self._tasks[index], "train", index, position)


def _row(task: Task, split: str, index: int, position: int) -> dict[str, Any]:
    """`raw_prompt` is only what verl shows of it."""
    return {
        "raw_prompt": task.init_messages or [{"role": "user", "content": task.main_query}],
        "data_source": "astuner",
        "split": split,
        "index": index,
        "position": position,
    }
