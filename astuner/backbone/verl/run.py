"""The `verl` backbone, the launcher's half: prepare, start verl, follow it, report.

Everything that can be wrong with the configuration, the user's code or the model shows
before verl is started. Then verl's processes run below a guard; this one reads what they
write, keeps the deadline for silence, passes a wish to stop on, and merges the last
checkpoint into a plain model folder. It imports neither Ray nor verl.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import UserParts, user_parts
from astuner.backbone.context import RunContext, RunResult
from astuner.backbone.report import finish, saved_step, verl_checkpoint
from astuner.backbone.sinks import open_sinks
from astuner.backbone.spawned import files
from astuner.backbone.spawned.batches import forget_batches
from astuner.backbone.spawned.choices import Device, Facts
from astuner.backbone.spawned.files import JobFile, write_job
from astuner.backbone.spawned.planning import context_of, shown, tell
from astuner.backbone.spawned.program import Program
from astuner.backbone.spawned.ray_cluster import authentication, check_address
from astuner.backbone.spawned.states import last_known
from astuner.backbone.spawned.supervise import Child
from astuner.backbone.spawned.watching import watch
from astuner.backbone.verl.merge import forget_model, merge_newest
from astuner.backbone.verl.progress import Follower
from astuner.backbone.verl.ray_cluster import environment
from astuner.backbone.verl.requirements import choose_device, has_flash_attention, need_verl
from astuner.backbone.verl.translate import check, raw, to_verl, warnings
from astuner.engine.model_source import resolve_model
from astuner.errors import CheckpointError, ConfigError, MissingDependency, UserCodeError
from astuner.task_reader import TaskOrder
from astuner.tracking import EpisodeStore, RunDisplay
from astuner.trainer import TrainResult, TrainSettings
from astuner.trainer.checkpoints import Checkpoint, TrainerState, check_resumable

FOLDER = "verl"
VERL = Program("verl", trainer="WatchedTaskRunner")
DRIVER = (sys.executable, "-m", "astuner.backbone.verl.driver")


async def run(context: RunContext) -> RunResult:
    """Tune with verl. Raises AstunerError; what was saved until then stays in the run folder."""
    config = context.config
    need_verl()
    check_address(config.trainer_common.ray_address)
    with ExitStack() as stack:
        display = stack.enter_context(RunDisplay(**shown(context)))
        device = choose_device(config, display.note)
        check(config, device)
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"finding model {config.model.path}")
        plan = _plan(context, parts, device, has_flash_attention(device, display.note))
        _tell(context, plan, display)
        if plan.state.step >= plan.settings.total_steps:  # resumed, but nothing is left to do
            state = plan.state
        else:
            state = await _train(stack, context, plan, display)
        display.stage("merging the checkpoint into one model folder")
        model_dir = await asyncio.to_thread(_merged, plan, display)
    stopped = state.step < plan.settings.total_steps
    saved = verl_checkpoint(plan.run_dir)
    result = TrainResult(state.step, stopped, state.totals, state.evals, saved)
    return finish(context, result, model_dir=model_dir, what="tuned model")


# ---------------------------------------------------------------- before verl is started


@dataclass(frozen=True)
class Plan:
    """What is to be done, all of it checked."""

    run_dir: Path
    """Absolute: verl's processes have working directories of their own."""
    parts: UserParts
    model: Path
    device: Device
    settings: TrainSettings
    verl: dict[str, Any]
    step: int
    """After which the run goes on."""
    state: TrainerState
    """What was reported until then; of an earlier step where a kill came after the checkpoint
    and before verl's metrics."""
    resumes: bool
    changed: str | None = None
    """What is different from when the run began."""

    @property
    def folder(self) -> Path:
        return self.run_dir / FOLDER


def _plan(context: RunContext, parts: UserParts, device: Device, flash_attention: bool) -> Plan:
    config, run_dir = context.config, context.run_dir.absolute()
    model = resolve_model(config.model.path)
    order = TaskOrder.configured(config, len(parts.tasks.train))
    settings = TrainSettings.from_config(config, order.steps_per_epoch)
    step = saved_step(run_dir, "verl") if context.resume else None
    state = TrainerState(step or 0, settings.seed, settings.config_hash)
    changed = None
    if step is not None:
        state = last_known(run_dir / FOLDER, step) or state
        changed = check_resumable(Checkpoint(run_dir / FOLDER, state), settings)
        state = replace(state, config_hash=settings.config_hash)
    held_out = bool(parts.tasks.validation)
    facts = Facts(str(model), context_of(model), settings.total_steps, held_out, flash_attention)
    verl = to_verl(config, run_dir=run_dir, device=device, resume=step is not None, facts=facts)
    if step and "trainer.val_before_train" not in raw(config):
        verl["trainer.val_before_train"] = held_out and _owed(step, state, settings)
    return Plan(
        run_dir, parts, model, device, settings, verl, step or 0, state, step is not None, changed
    )


def _owed(step: int, state: TrainerState, settings: TrainSettings) -> bool:
    """A validation that was due when the run was killed."""
    due = settings.test_freq > 0 and step % settings.test_freq == 0
    return (due or step >= settings.total_steps) and step not in state.evals


def _tell(context: RunContext, plan: Plan, display: RunDisplay) -> None:
    tell(
        context,
        display,
        warnings(context.config, plan.device),
        step=plan.step,
        resumes=plan.resumes,
        changed=plan.changed,
    )


# ---------------------------------------------------------------- while it runs


async def _train(
    stack: ExitStack, context: RunContext, plan: Plan, display: RunDisplay
) -> TrainerState:
    """From the first process to the last; the state after the last step."""
    folder, config = plan.folder, context.config
    folder.mkdir(parents=True, exist_ok=True)
    files.clear(folder, but_groups=plan.resumes)
    forget_batches(folder, after=plan.step)
    forget_model(plan.run_dir)
    job = JobFile(config, plan.parts.workflow, plan.parts.judge, plan.parts.tasks, plan.run_dir)
    write_job(folder, job)
    (folder / files.SETTINGS).write_text(json.dumps(plan.verl, indent=1))
    follower = _follower(stack, context, plan, display)
    if plan.resumes:
        follower.catch_up(plan.step)
    variables = environment(folder, plan.device)
    variables |= authentication(config.trainer_common.ray_address)
    child = Child([*DRIVER, str(folder)], folder, variables, log=VERL.log)
    stack.callback(child.close)
    try:
        await watch(VERL, context, child, follower, folder, display)
    except (ConfigError, UserCodeError, MissingDependency):
        if follower.state.step == 0:  # the log says no more than the error
            await child.aclose()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return follower.state


def _follower(stack: ExitStack, context: RunContext, plan: Plan, display: RunDisplay) -> Follower:
    from transformers import AutoTokenizer

    step = plan.state.step if plan.resumes else None
    sinks = open_sinks(stack, context, step)
    tokenizer: Any = AutoTokenizer.from_pretrained(plan.model, local_files_only=True)
    return Follower(
        plan.folder,
        plan.settings,
        sinks=sinks,
        episodes=EpisodeStore(context.run_dir, resume_step=step, decode=tokenizer.decode),
        display=display,
        state=plan.state,
    )


def _merged(plan: Plan, display: RunDisplay) -> Path | None:
    """The plain model folder; what cannot be merged is still a checkpoint."""
    if verl_checkpoint(plan.run_dir) is None:
        return None
    try:
        return merge_newest(plan.run_dir, plan.model)
    except CheckpointError as error:
        display.note(f"The checkpoint is not merged into one model folder: {error}")
        return None
