"""What runs in one of Trinity's runner processes: our proxy, episode runner and rollout.

Opened by the first group, and shared by all that follow; a process has one group at a time.
What is no single group's trouble ends the run through `files.give_up`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import (
    UserParts,
    Workbench,
    open_server,
    rollout_settings,
    workbench,
)
from astuner.backbone.spawned.files import (
    SETTINGS,
    JobFile,
    folder_of_process,
    give_up,
    read_job,
    sign_of_life,
)
from astuner.backbone.trinity.checkpoints import sampler_path
from astuner.backbone.trinity.engine import Sampler, ServiceSampler, TrinityEngine, VllmSampler
from astuner.chat import load_codec
from astuner.task_rollout import RolloutSettings, Watchdog
from astuner.trainer import TrainSettings
from astuner.types import Episode

WATCHDOG_SECONDS = 60.0


@dataclass(frozen=True)
class Desk:
    """Everything that a group needs."""

    folder: Path
    job: JobFile
    bench: Workbench
    engine: TrinityEngine
    settings: TrainSettings


_opened: dict[Path, asyncio.Task[Desk]] = {}
_stack = ExitStack()


async def desk(model: Any) -> Desk:
    """This process's. `model` is the ModelWrapper of Trinity's that its workflows are given."""
    folder = folder_of_process()
    if folder not in _opened:
        loop = asyncio.get_running_loop()
        opening = asyncio.to_thread(_open, folder, model, loop)
        _opened[folder] = task = asyncio.create_task(opening)
        task.add_done_callback(_tell_failure)
    return await asyncio.shield(_opened[folder])


def _tell_failure(task: asyncio.Task[Desk]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        give_up(folder_of_process(), error)


def _open(folder: Path, model: Any, loop: asyncio.AbstractEventLoop) -> Desk:
    job = read_job(folder)
    engine = TrinityEngine(
        _sampler(model, folder, job.run_dir),
        loop,
        max_context=int(model.config.max_model_len),
        on_answer=partial(sign_of_life, folder, "a call was answered"),
    )
    return open_desk(folder, job, engine, model.config.model_path, _stack)


def open_desk(
    folder: Path, job: JobFile, engine: TrinityEngine, model_path: str, stack: ExitStack
) -> Desk:
    """Start the proxy, to be closed by `stack`. Blocks for a while. Raises AstunerError."""
    from transformers import AutoTokenizer

    config = job.config
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    codec = load_codec(
        tokenizer,
        renderer=config.model.renderer,
        template_kwargs=config.model.template_kwargs,
        model_name=config.model.path,
    )

    def ended(episode: Episode) -> None:
        sign_of_life(folder, f"episode {episode.episode_id} ended")

    bench = stack.enter_context(
        workbench(
            config,
            UserParts(job.workflow, job.judge, job.tasks),
            open_server(config, engine, codec),
            version=lambda: engine.version,
            on_episode=ended,
            settings=share(rollout_settings(config), _runners(folder)),
        )
    )
    stack.enter_context(
        Watchdog(lambda: bench.runner.live, lambda: engine.answers, after=WATCHDOG_SECONDS)
    )
    return Desk(folder, job, bench, engine, TrainSettings.from_config(config, steps_per_epoch=1))


def share(whole: RolloutSettings, runners: int) -> RolloutSettings:
    """One process's share of the limits."""
    limit = whole.fail_fast_groups
    return replace(
        whole,
        max_env_worker=ceil(whole.max_env_worker / runners),
        # One failing task alone must not end a run, however many processes there are.
        fail_fast_groups=min(limit, max(2, ceil(limit / runners))),
    )


def _runners(folder: Path) -> int:
    settings = json.loads((folder / SETTINGS).read_text())
    engines = int(settings.get("explorer.rollout_model.engine_num", 1))
    return engines * int(settings.get("explorer.runner_per_model", 1))


def _sampler(model: Any, folder: Path, run_dir: Path) -> Sampler:
    if model.config.engine_type == "tinker":
        import tinker  # pyright: ignore[reportMissingImports]

        settings = json.loads((folder / SETTINGS).read_text())
        resumed = partial(sampler_path, run_dir) if settings["continue_from_checkpoint"] else None
        return ServiceSampler(model.model, tinker.ServiceClient(), resumed)
    import httpx

    http = httpx.AsyncClient(timeout=None)  # each call has a deadline of its own
    return VllmSampler(model.model, model.api_address, model.model_name, http)
