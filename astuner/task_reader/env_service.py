"""The task ids that an environment service lists, as Tasks.

Asks `/get_env_profile` of the HTTP env service (see `astuner.env.wire`) for each split. What
a task is about, only the service knows: the environment's first observation tells it.
"""

from __future__ import annotations

from typing import Any

import httpx

from astuner.config.schema import EnvServiceConfig, TaskReaderConfig
from astuner.errors import DataError
from astuner.task_reader.reader import TaskSplits
from astuner.types import Task

TIMEOUT = 120.0


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """Raises DataError when the service does not answer with a list."""
    service = config.env_service
    return TaskSplits(
        _tasks(service, service.training_split), _tasks(service, service.validation_split)
    )


def _tasks(service: EnvServiceConfig, split: str) -> list[Task]:
    body = {"env_type": service.env_type, "params": {"split": split}}
    url = f"{service.env_url.rstrip('/')}/get_env_profile"
    try:
        reply = httpx.post(url, json=body, timeout=TIMEOUT)
        listed: Any = reply.raise_for_status().json()["data"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The environment service gave no list of {split!r} tasks of {service.env_type!r} at "
            f"{url}: {error}. Is it running, and is the name right?"
        ) from None
    if not isinstance(listed, list):
        raise DataError(f"{url} answered {listed!r:.200}, which is no list of task ids.")
    return [Task(task_id=str(task_id)) for task_id in listed]  # pyright: ignore
