"""What plays episodes in one of a trainer's processes: proxy, runner, rollout, and a watchdog.

Several such processes share the run's limits. What is opened is closed by the caller's
ExitStack. The launcher is handed every group; what the trainer gets of it is the backbone's
affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Literal, Protocol

from astuner.backbone.assembly import (
    UserParts,
    Workbench,
    open_codec,
    open_server,
    rollout_settings,
    workbench,
)
from astuner.backbone.spawned.files import GroupRecord, JobFile, sign_of_life, spool_group
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import Engine
from astuner.task_rollout import Rollout, RolloutSettings, Watchdog
from astuner.types import Episode

WATCHDOG_SECONDS = 60.0


class AnsweringEngine(Engine, Protocol):
    @property
    def version(self) -> int:
        """The newest weights that were seen to answer."""
        ...

    @property
    def answers(self) -> int:
        """So many calls were answered."""
        ...


def open_bench(
    folder: Path,
    job: JobFile,
    engine: AnsweringEngine,
    tokenizer: Any,
    stack: ExitStack,
    *,
    processes: int,
    settings: RolloutSettings | None = None,
) -> Workbench:
    """One of so many `processes`'. `settings` of the whole run take the place of those that the
    configuration says. Blocks for a while. Raises AstunerError."""
    config = with_fewer_environments(job.config, processes)

    def ended(episode: Episode) -> None:
        sign_of_life(folder, f"episode {episode.episode_id} ended")

    bench = stack.enter_context(
        workbench(
            config,
            UserParts(job.workflow, job.judge, job.tasks),
            open_server(config, engine, open_codec(config, tokenizer)),
            version=lambda: engine.version,
            on_episode=ended,
            settings=share(settings or rollout_settings(config), processes),
        )
    )
    stack.enter_context(
        Watchdog(lambda: bench.runner.live, lambda: engine.answers, after=WATCHDOG_SECONDS)
    )
    return bench


async def hand_over(
    folder: Path,
    rollout: Rollout,
    episodes: Sequence[Episode],
    *,
    step: int,
    split: Literal["train", "validation"],
    kept: bool = True,
    name: str = "",
) -> None:
    """A group that has ended goes to the launcher; see `GroupRecord`. Raises OSError."""
    counters = rollout.take_counters()
    group = episodes[0].group_id
    record = GroupRecord(step, split, group, tuple(episodes), kept, counters, name)
    await asyncio.to_thread(spool_group, folder, record)


def share(whole: RolloutSettings, processes: int) -> RolloutSettings:
    """One process's share of the limits."""
    limit = whole.fail_fast_groups
    return replace(
        whole,
        max_env_worker=ceil(whole.max_env_worker / processes),
        # One failing task alone must not end a run, however many processes there are.
        fail_fast_groups=min(limit, max(2, ceil(limit / processes))),
    )


def with_fewer_environments(config: AstunerConfig, processes: int) -> AstunerConfig:
    """With one process's share of the environments that may exist at once."""
    instances = ceil(config.env.max_instances / processes)
    return replace(config, env=replace(config.env, max_instances=instances))
