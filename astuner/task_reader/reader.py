"""The configured dataset as training and validation Tasks.

Each reader in `READERS` brings its rows; what is common to all happens here:
the held-out fraction where a source has no validation split, the cap on training
tasks, and the refusal of an empty dataset. Batches are `TaskOrder`'s business.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from astuner.config.schema import TaskReaderConfig
from astuner.errors import ConfigError, DataError
from astuner.types import Task


@dataclass(frozen=True, slots=True)
class TaskSplits:
    """Disjoint by task; ids are unique within each."""

    train: list[Task]
    validation: list[Task]


Reader = Callable[[TaskReaderConfig, int], TaskSplits]
"""`(config, seed)` to splits; an empty validation split asks for the held-out fraction."""

READERS: dict[str, str] = {
    "jsonl_dataset_file": "astuner.task_reader.jsonl:read",
    "huggingface_dat_repo": "astuner.task_reader.huggingface:read",
    "reasoning_gym": "astuner.task_reader.gym:read",
    "environment": "astuner.task_reader.environment:read",
    "env_service": "astuner.task_reader.env_service:read",
    "traces": "astuner.task_reader.traces:read",
    "random_dummy": "astuner.task_reader.dummy:read",
}


def read_tasks(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """The tasks of the configured dataset; the same for the same config and seed.

    Raises DataError for missing, empty or malformed data, MissingDependency where a
    reader's package is absent, ConfigError for an unknown type.
    """
    if config.type not in READERS:
        raise ConfigError(
            f"astuner.task_reader.type is {config.type!r}, but must be one of {', '.join(READERS)}."
        )
    module, _, attribute = READERS[config.type].partition(":")
    read: Reader = getattr(import_module(module), attribute)
    splits = read(config, seed)
    if not splits.train:
        raise DataError(
            f"The training split of the {config.type} dataset is empty. "
            f"Look at astuner.task_reader.{config.type}."
        )
    if not splits.validation:
        splits = hold_out(splits.train, config.validation_fraction, seed)
    keep = config.max_train_tasks or len(splits.train)
    return TaskSplits(splits.train[:keep], splits.validation)


def hold_out(tasks: list[Task], fraction: float, seed: int) -> TaskSplits:
    """A seeded share of the tasks becomes the validation split: at least one task if the
    fraction is above 0, and never the last one left for training. Order is kept."""
    count = min(max(1, round(fraction * len(tasks))), len(tasks) - 1) if fraction > 0 else 0
    held = set(random.Random(f"hold-out {seed}").sample(range(len(tasks)), count))
    return TaskSplits(
        [task for index, task in enumerate(tasks) if index not in held],
        [task for index, task in enumerate(tasks) if index in held],
    )
