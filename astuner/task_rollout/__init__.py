"""Many episodes: groups, concurrency, retries, the staleness gate and the watchdog."""

from __future__ import annotations

from astuner.task_rollout.naming import Place
from astuner.task_rollout.rollout import Rollout, RolloutSettings
from astuner.task_rollout.sources import AsyncSource, GroupSource, SyncSource, make_source
from astuner.task_rollout.watchdog import Watchdog

__all__ = [
    "AsyncSource",
    "GroupSource",
    "Place",
    "Rollout",
    "RolloutSettings",
    "SyncSource",
    "Watchdog",
    "make_source",
]
