"""Datasets to Tasks: `read_tasks` gives the splits, `TaskOrder` who comes in which step."""

from __future__ import annotations

from astuner.task_reader.order import TaskOrder
from astuner.task_reader.reader import READERS, TaskSplits, read_tasks

__all__ = ["READERS", "TaskOrder", "TaskSplits", "read_tasks"]
