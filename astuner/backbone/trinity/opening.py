"""What runs in one of Trinity's runner processes: our proxy, episode runner and rollout.

Opened by the first group, and shared by all that follow; a process has one group at a time.
What is no single group's trouble ends the run through `files.give_up`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import Workbench
from astuner.backbone.spawned.bench import open_bench
from astuner.backbone.spawned.files import (
    SETTINGS,
    JobFile,
    folder_of_process,
    give_up,
    read_job,
    sign_of_life,
)
from astuner.backbone.trinity.engine import Sampler, ServiceSampler, TrinityEngine, VllmSampler
from astuner.backbone.trinity.served_weights import IN_TURNS, BroughtWeights, TurnsWeights
from astuner.trainer import TrainSettings


@dataclass(frozen=True)
class Desk:
    """Everything that a group needs."""

    folder: Path
    job: JobFile
    bench: Workbench
    engine: TrinityEngine
    settings: TrainSettings
    turns: TurnsWeights | None = None
    """Where a step has to be sampled with the weights of the step before."""


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
    sampler, turns = _sampler(model, folder, job)
    engine = TrinityEngine(
        sampler,
        loop,
        max_context=int(model.config.max_model_len),
        on_answer=partial(sign_of_life, folder, "a call was answered"),
    )
    return open_desk(folder, job, engine, model.config.model_path, _stack, turns)


def open_desk(
    folder: Path,
    job: JobFile,
    engine: TrinityEngine,
    model_path: str,
    stack: ExitStack,
    turns: TurnsWeights | None = None,
) -> Desk:
    """Start the proxy, to be closed by `stack`. Blocks for a while. Raises AstunerError."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    bench = open_bench(folder, job, engine, tokenizer, stack, processes=_runners(folder))
    settings = TrainSettings.from_config(job.config, steps_per_epoch=1)
    return Desk(folder, job, bench, engine, settings, turns)


def _runners(folder: Path) -> int:
    settings = json.loads((folder / SETTINGS).read_text())
    engines = int(settings.get("explorer.rollout_model.engine_num", 1))
    return engines * int(settings.get("explorer.runner_per_model", 1))


def _sampler(model: Any, folder: Path, job: JobFile) -> tuple[Sampler, TurnsWeights | None]:
    if model.config.engine_type == "tinker":
        return _of_service(model, folder, job)
    import httpx

    http = httpx.AsyncClient(timeout=None)  # each call has a deadline of its own
    return VllmSampler(model.model, model.api_address, model.model_name, http), None


def _of_service(model: Any, folder: Path, job: JobFile) -> tuple[Sampler, TurnsWeights | None]:
    import tinker  # pyright: ignore[reportMissingImports]

    settings, config = json.loads((folder / SETTINGS).read_text()), job.config
    turns = None
    if all(settings[key] == value for key, value in IN_TURNS.items()):
        limit = config.trainer_common.stall_timeout
        turns = TurnsWeights(job.run_dir, model.config.model_path, seconds=limit)
    resumed = bool(settings["continue_from_checkpoint"])
    weights = turns or BroughtWeights(model.model, job.run_dir, resumed=resumed)
    client = tinker.ServiceClient()
    return ServiceSampler(weights, client, open_seconds=config.rollout.call_timeout), turns
