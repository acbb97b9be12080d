"""Which tasks a training step takes: a pure function of (seed, step).

So a resumed run needs no state but its step. Epochs run into each other: the last
batch of an epoch is filled from the start of the next one, so that every batch is
full and every task comes equally often. A task may therefore come twice in a
batch that spans two epochs. It holds no tasks, only their numbers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from astuner.config.schema import AstunerConfig
from astuner.errors import DataError


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """An endless order of `num_tasks` tasks in batches of `batch_size`."""

    num_tasks: int
    batch_size: int
    seed: int
    shuffle: bool = True
    """A new order every epoch; otherwise always 0, 1, 2, ..."""

    @classmethod
    def configured(cls, config: AstunerConfig, num_tasks: int) -> TaskOrder:
        """That of a run over so many training tasks. Raises DataError."""
        return cls(num_tasks, config.data.train_batch_size, config.seed, config.task_reader.shuffle)

    def __post_init__(self) -> None:
        if self.num_tasks < 1 or self.batch_size < 1:
            raise DataError(
                f"Cannot make batches of {self.batch_size} from {self.num_tasks} training tasks; "
                "both must be at least 1."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every task has come at least once."""
        return -(-self.num_tasks // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The task numbers of this step, counted from 0: always `batch_size` of them."""
        start = step * self.batch_size
        return [self._at(position) for position in range(start, start + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_tasks)
        return _shuffled(self.num_tasks, self.seed, epoch)[offset] if self.shuffle else offset


@lru_cache(maxsize=4)
def _shuffled(num_tasks: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_tasks))
    random.Random(f"task order {seed}/{epoch}").shuffle(order)
    return tuple(order)
