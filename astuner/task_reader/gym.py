"""Generated tasks of the reasoning-gym package, with their own scorers.

Validation and training come from different seeds and share no question, nor does
either hold one twice: small generators (one-digit sums) repeat themselves, so the
split is over distinct questions. Everything the package's scorer needs travels in
`Task.metadata`; scoring is `task_judge`'s business.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import random
from collections.abc import Iterator
from typing import Any

from astuner.config.schema import ReasoningGymConfig, TaskReaderConfig
from astuner.errors import DataError, MissingDependency
from astuner.task_reader.reader import TaskSplits
from astuner.types import Task

logger = logging.getLogger(__name__)

_KEY = "astuner.task_reader.reasoning_gym"
_PATIENCE = 1000
"""So many known questions in a row mean that the generator has no new ones."""


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """Validation first, then training without its questions.

    The run's seed decides, unless `params.seed` is set. Where the generator has too few
    distinct questions the training set is smaller, with a warning. Raises DataError for
    an unknown generator, wrong params, or when nothing is left to train on.
    """
    gym = config.reasoning_gym
    seed = gym.params.get("seed", seed)
    seen: set[str] = set()
    validation = _tasks(gym, f"{seed}/validation", gym.validation_size, seen)
    train = _tasks(gym, f"{seed}/train", gym.size, seen)
    if not train:
        raise DataError(
            f"{gym.dataset} with params {gym.params} has only {len(validation)} different "
            f"questions, and validation took them all. Lower {_KEY}.validation_size, or make "
            "the tasks more varied."
        )
    if len(train) < gym.size:
        logger.warning(
            "%s with params %s has only %d different questions: %d train and %d validate "
            "(asked for %d and %d). Make the tasks more varied for more.",
            gym.dataset, gym.params, len(seen), len(train), len(validation),
            gym.size, gym.validation_size,
        )  # fmt: skip
    return TaskSplits(train, validation)


def _tasks(gym: ReasoningGymConfig, seed: str, count: int, seen: set[str]) -> list[Task]:
    """Up to `count` tasks whose questions are not in `seen`, which they are added to."""
    if count == 0:
        return []
    tasks: list[Task] = []
    misses = 0
    for entry in _entries(gym, seed):
        if entry["question"] in seen:
            misses += 1
        else:
            misses = 0
            seen.add(entry["question"])
            tasks.append(_task(gym, entry, len(tasks)))
        if len(tasks) == count or misses == _PATIENCE:
            break
    return tasks


def _task(gym: ReasoningGymConfig, entry: dict[str, Any], index: int) -> Task:
    params = {name: value for name, value in gym.params.items() if name != "seed"}
    return Task(
        task_id=str(index),
        main_query=entry["question"] + gym.prompt_suffix,
        metadata={
            "answer": entry["answer"],
            "reasoning_gym": {"dataset": gym.dataset, "params": params, "entry": entry},
        },
    )


def _entries(gym: ReasoningGymConfig, seed: str) -> Iterator[dict[str, Any]]:
    """The generator's entries without end; a generator of finite size is seeded anew."""
    size = max(1000, gym.size + gym.validation_size)
    for part in range(1_000_000):
        number = random.Random(f"reasoning_gym {seed}/{part}").randrange(2**31)
        dataset = _create(gym, size=size, seed=number)
        for index in range(size):
            yield dataset[index]


def _create(gym: ReasoningGymConfig, *, size: int, seed: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "reasoning-gym", "reasoning-gym", "task_reader.type: reasoning_gym"
        ) from error
    if gym.dataset not in DATASETS:
        near = difflib.get_close_matches(gym.dataset, DATASETS)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has: {', '.join(DATASETS)}."
        raise DataError(f"{_KEY}.dataset: reasoning-gym has no {gym.dataset!r}. {hint}")
    try:
        return create_dataset(gym.dataset, **{**gym.params, "size": size, "seed": seed})
    except (TypeError, AssertionError, ValueError) as error:
        known = [f.name for f in dataclasses.fields(DATASETS[gym.dataset][1])]
        raise DataError(
            f"{_KEY}.params: {gym.dataset} does not take {gym.params}: {error}. "
            f"Its settings are: {', '.join(n for n in known if n not in ('size', 'seed'))}."
        ) from error
