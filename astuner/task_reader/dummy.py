"""Sums of two small numbers, for trying things out without any data.

Deterministic in the seed; training and validation share no sum.
"""

from __future__ import annotations

import random

from astuner.config.schema import TaskReaderConfig
from astuner.errors import DataError
from astuner.task_reader.reader import TaskSplits
from astuner.types import Task

_LIMIT = 100
"""Both summands are below this."""


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """`size` + `validation_size` distinct sums. Raises DataError if there are not so many."""
    sizes = config.random_dummy
    wanted = sizes.size + sizes.validation_size
    if wanted > _LIMIT**2:
        raise DataError(
            f"random_dummy has {_LIMIT**2} different tasks, but size + validation_size is {wanted}."
        )
    pairs = random.Random(f"dummy {seed}").sample(range(_LIMIT**2), wanted)
    tasks = [_task(index, *divmod(pair, _LIMIT)) for index, pair in enumerate(pairs)]
    return TaskSplits(tasks[: sizes.size], tasks[sizes.size :])


def _task(index: int, a: int, b: int) -> Task:
    query = f"What is {a} + {b}? Reply with just the number."
    return Task(task_id=str(index), main_query=query, metadata={"answer": str(a + b)})
