"""The `trinity` backbone, the launcher's half: prepare, start Trinity, follow it, report.

Everything that can be wrong with the configuration, the user's code or the model shows
before anything is started. Where Trinity's own engines are not used, astuner's service is
started beside it. Then Trinity's processes run below a guard; this one reads what they
write, keeps the deadline for silence, passes a wish to stop on, counts the steps (whatever
Trinity reports), validates the last weights and copies the tuned adapter. It imports
neither Ray nor Trinity.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import user_parts
from astuner.backbone.context import RunContext, RunResult
from astuner.backbone.report import finish
from astuner.backbone.sinks import open_sinks
from astuner.backbone.spawned import files
from astuner.backbone.spawned.batches import BATCHES
from astuner.backbone.spawned.failing import failure
from astuner.backbone.spawned.files import JobFile, write_job
from astuner.backbone.spawned.planning import shown, tell
from astuner.backbone.spawned.program import Program
from astuner.backbone.spawned.ray_cluster import authentication, check_address
from astuner.backbone.spawned.supervise import Child
from astuner.backbone.spawned.watching import watch
from astuner.backbone.trinity import checkpoints, final
from astuner.backbone.trinity.accounts import role_file
from astuner.backbone.trinity.cluster import driver_environment
from astuner.backbone.trinity.planning import Plan, make_plan, write_tasks
from astuner.backbone.trinity.progress import TRAINER, Follower
from astuner.backbone.trinity.requirements import choose_device, need_trinity
from astuner.backbone.trinity.sections import raw, route
from astuner.backbone.trinity.service_child import RunningService, start_service
from astuner.backbone.trinity.surplus import Surplus
from astuner.backbone.trinity.translate import check, to_trinity, warnings
from astuner.backbone.trinity.workarounds import IN_MEMORY, Breaks
from astuner.errors import AstunerError, BackboneError, CheckpointError, DeadlineExceeded
from astuner.tracking import EpisodeStore, RunDisplay
from astuner.trainer import TrainResult
from astuner.trainer.checkpoints import TrainerState

TRINITY = Program("trinity", trainer="Trainer.")
DRIVER = (sys.executable, "-m", "astuner.backbone.trinity.driver")


async def run(context: RunContext) -> RunResult:
    """Tune with Trinity. Raises AstunerError; what was saved until then stays in the run folder."""
    config = context.config
    with ExitStack() as stack:
        display = stack.enter_context(RunDisplay(**shown(context)))
        device = choose_device(config, display.note)
        need_trinity(route(config, device))
        check_address(config.trainer_common.ray_address)
        check(config, device)
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"finding model {config.model.path}")
        plan = make_plan(context, parts, device)
        notes = warnings(config, device)
        at, resumes = plan.state.step, plan.resumes
        tell(context, display, notes, step=at, resumes=resumes, changed=plan.changed)
        state = plan.state
        if state.step < plan.settings.total_steps:
            state = await _train(stack, context, plan, display)
        display.stage("copying the tuned adapter")
        model_dir = await asyncio.to_thread(_exported, plan, display)
    stopped = state.step < plan.settings.total_steps
    saved = checkpoints.newest(plan.run_dir)
    result = TrainResult(state.step, stopped, state.totals, state.evals, saved)
    return finish(context, result, model_dir=model_dir, what="tuned adapter")


# ---------------------------------------------------------------- while it runs


async def _train(
    stack: ExitStack, context: RunContext, plan: Plan, display: RunDisplay
) -> TrainerState:
    """From the first process to the last; the state after the last step."""
    folder, config = plan.folder, context.config
    _prepare(plan)
    service: RunningService | None = None
    if route(config, plan.device) == "service":
        display.stage("starting astuner's service")
        service = await start_service(config, plan.model, folder)
        stack.callback(service.close)
    (folder / files.SETTINGS).write_text(json.dumps(trinity_settings(plan, service), indent=1))
    follower = _follower(stack, context, plan, display)
    access = (service.url, service.key) if service else None
    variables = driver_environment(folder, access)
    variables |= authentication(config.trainer_common.ray_address)
    surplus = Surplus(plan.run_dir, plan.config.trainer_common, plan.settings.total_steps, access)
    watched = Watched(follower, Breaks(folder / TRINITY.log), plan, surplus)
    child = Child([*DRIVER, str(folder)], folder, variables, log=TRINITY.log)
    stack.callback(child.close)
    try:
        await watch(TRINITY, context, child, watched, folder, display)
        check_steps(plan, follower.state.step, stopped=context.stop.is_set())
        await surplus.settle()
        await child.aclose()
        if access and follower.state.step >= plan.settings.total_steps:
            await _validate_last(plan, follower, access, display)
    except (BackboneError, DeadlineExceeded, CheckpointError):
        raise  # its log is worth reading
    except AstunerError:
        if follower.state.step == 0:
            await child.aclose()
            if service is not None:
                service.close()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return follower.state


def _prepare(plan: Plan) -> None:
    """A folder in which nothing is left of an earlier attempt but what is to be gone on with."""
    folder = plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    files.clear(folder)
    for name in (BATCHES, role_file(TRAINER)):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(plan.run_dir / checkpoints.MODEL, ignore_errors=True)
    if plan.resumes:
        per_step = plan.config.data.train_batch_size
        checkpoints.rewind(plan.run_dir, plan.state.step, per_step)
    else:
        shutil.rmtree(checkpoints.job_folder(plan.run_dir), ignore_errors=True)
    parts = plan.parts
    write_job(folder, JobFile(plan.config, parts.workflow, parts.judge, parts.tasks, plan.run_dir))
    write_tasks(plan)


def trinity_settings(plan: Plan, service: RunningService | None) -> dict[str, Any]:
    """What Trinity is told; the user's own settings win."""
    told = to_trinity(
        plan.config,
        run_dir=plan.run_dir,
        service_url=service.url if service else None,
        device=plan.device,
        resume=plan.resumes,
        facts=plan.facts,
    )
    return {**told, **(IN_MEMORY if service else {}), **raw(plan.config)}


def _follower(stack: ExitStack, context: RunContext, plan: Plan, display: RunDisplay) -> Follower:
    from transformers import AutoTokenizer

    step = plan.state.step if plan.resumes else None
    sinks = open_sinks(stack, context, step)
    tokenizer: Any = AutoTokenizer.from_pretrained(plan.model, local_files_only=True)
    return Follower(
        plan.folder,
        plan.settings,
        validations=plan.validations,
        sinks=sinks,
        episodes=EpisodeStore(context.run_dir, resume_step=step, decode=tokenizer.decode),
        display=display,
        state=plan.state,
    )


class Watched:
    """A Follower that also minds what Trinity does not: that one of its halves broke off, and
    that checkpoints are too many."""

    def __init__(self, follower: Follower, breaks: Breaks, plan: Plan, surplus: Surplus) -> None:
        self._follower = follower
        self._breaks = breaks
        self._plan = plan
        self._surplus = surplus
        self._broke = False

    def poll(self) -> None:
        """Raises BackboneError one poll after a half broke off, so that its log is whole."""
        broke, self._broke = self._broke, self._broke or self._breaks.found()
        self._follower.poll()
        if broke and self._follower.state.step < self._plan.settings.total_steps:
            raise failure(TRINITY, self._plan.folder, 1)
        self._surplus.delete(self._follower.state.step)
        if self._follower.state.step >= self._plan.settings.total_steps:
            (self._plan.folder / files.STOP).touch()  # the explorer goes on by itself

    def signs(self) -> object:
        return self._follower.signs()

    @property
    def waits_for(self) -> str:
        return self._follower.waits_for


def check_steps(plan: Plan, step: int, *, stopped: bool) -> None:
    """Raises BackboneError when fewer steps were trained than asked for."""
    total = plan.settings.total_steps
    if step >= total or stopped:
        return
    raise BackboneError(
        f"Trinity ended after {step} of {total} steps and reported success. Everything it "
        f"printed: {plan.folder / TRINITY.log}; the logs of its parts: "
        f"{checkpoints.job_folder(plan.run_dir) / 'log'}."
    )


async def _validate_last(
    plan: Plan, follower: Follower, access: tuple[str, str], display: RunDisplay
) -> None:
    checkpoint, step = checkpoints.newest(plan.run_dir), follower.state.step
    if checkpoint is None or not plan.validations or step in follower.state.evals:
        return
    state_path = checkpoints.remote_path(checkpoint)
    if state_path is None or checkpoints.step_of(checkpoint) != step:
        return
    display.stage("eval", step, step)
    episodes = await final.validate(plan.config, plan.parts, plan.model, access, state_path, step)
    follower.validated(step, episodes)


def _exported(plan: Plan, display: RunDisplay) -> Path | None:
    """The tuned adapter's folder; what cannot be copied is still a checkpoint."""
    try:
        return checkpoints.export(plan.run_dir)
    except CheckpointError as error:
        display.note(f"The tuned adapter is not copied: {error}")
        return None
