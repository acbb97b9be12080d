"""What a run with Trinity is going to do, all of it checked before anything is started.

Trinity's explorer reads its tasks from files, which hold the order in which they are played.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from astuner.backbone.assembly import UserParts
from astuner.backbone.context import RunContext
from astuner.backbone.spawned.choices import Device, Facts
from astuner.backbone.spawned.planning import context_of
from astuner.backbone.spawned.states import state_at
from astuner.backbone.trinity import checkpoints
from astuner.backbone.trinity.sections import FOLDER, tasks_folder
from astuner.config.schema import AstunerConfig
from astuner.engine.model_source import resolve_model
from astuner.task_reader import TaskOrder
from astuner.trainer import TrainSettings
from astuner.trainer.checkpoints import Checkpoint, TrainerState, check_resumable

SPARE_STEPS = 64
"""Of tasks beyond the last step: the explorer runs ahead, and may replace groups."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, all of it checked."""

    config: AstunerConfig
    run_dir: Path
    """Absolute: Trinity's processes have working directories of their own."""
    parts: UserParts
    model: Path
    facts: Facts
    device: Device
    order: TaskOrder
    settings: TrainSettings
    state: TrainerState
    """Where the run goes on."""
    resumes: bool
    changed: str | None = None
    """What is different from when the run began."""

    @property
    def folder(self) -> Path:
        return self.run_dir / FOLDER

    @property
    def validations(self) -> int:
        """Episodes of one validation."""
        val = self.config.rollout.val_kwargs
        return len(self.parts.tasks.validation[: val.max_tasks or None]) * val.num_repeat


def make_plan(context: RunContext, parts: UserParts, device: Device) -> Plan:
    config, run_dir = context.config, context.run_dir.absolute()
    model = resolve_model(config.model.path)
    order = TaskOrder.configured(config, len(parts.tasks.train))
    settings = TrainSettings.from_config(config, order.steps_per_epoch)
    found = checkpoints.newest(run_dir) if context.resume else None
    state = TrainerState(0, settings.seed, settings.config_hash)
    changed = None
    if found is not None:
        state = state_at(run_dir / FOLDER, checkpoints.step_of(found), state)
        changed = check_resumable(Checkpoint(found, state), settings)
        state = replace(state, config_hash=settings.config_hash)
    facts = Facts(str(model), context_of(model), settings.total_steps, bool(parts.tasks.validation))
    resumes = found is not None
    return Plan(
        config, run_dir, parts, model, facts, device, order, settings, state, resumes, changed
    )


def write_tasks(plan: Plan) -> None:
    """The tasks in the order in which they are played, as rows that name them."""
    batches = range(plan.settings.total_steps + SPARE_STEPS)
    train = [index for step in batches for index in plan.order.indices(step)]
    most = plan.config.rollout.val_kwargs.max_tasks or None
    validation = list(range(len(plan.parts.tasks.validation[:most])))
    for split, indices in (("train", train), ("validation", validation)):
        folder = tasks_folder(plan.run_dir, split)  # pyright: ignore[reportArgumentType]
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps({"index": index}) + "\n" for index in indices)
        (folder / "tasks.jsonl").write_text(rows)
