"""The `local` backbone: everything embedded in one process, on one CPU or GPU.

Rollouts, the proxy and training share one embedded model. Also evaluates a model
without training (`astuner eval`). Owns what it starts; leaves a run folder behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from astuner.backbone.assembly import (
    UserParts,
    Workbench,
    open_codec,
    open_model,
    open_server,
    user_parts,
    workbench,
)
from astuner.backbone.context import RunContext, RunResult
from astuner.config.loaded import COMMAND_LINE
from astuner.config.schema import AstunerConfig
from astuner.engine.embedded.model import EmbeddedModel
from astuner.errors import CheckpointError
from astuner.task_reader import TaskOrder
from astuner.task_rollout import GroupSource, Watchdog, make_source
from astuner.tracking import (
    EpisodeStore,
    MetricSinks,
    RunDisplay,
    learning_curve,
    next_commands,
    summary_table,
    write_summary,
)
from astuner.trainer import Checkpoints, EvalResult, TrainResult, TrainSettings, train
from astuner.types import Episode, Task

WATCHDOG_SECONDS = 60.0


async def run(context: RunContext) -> RunResult:
    """Tune, and write `summary.json`, the learning curve, episodes and checkpoints.

    Raises AstunerError; what was finished until then stays in the run folder.
    """
    config = context.config
    with ExitStack() as stack:
        display = stack.enter_context(
            RunDisplay(
                step_lines="console" in config.trainer_common.logger,
                episodes={"rollout": config.data.train_batch_size * config.rollout.num_repeat},
            )
        )
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"loading model {config.model.path}")
        model = open_model(config)
        stack.callback(model.close)
        bench = _bench(stack, config, parts, model, display)
        result = await _train(stack, context, parts, model, bench, display)
    summary = summarise(context, result)
    return _finish(context, result, summary)


async def evaluate(context: RunContext, adapter: Path | None) -> EvalResult:
    """The held-out score of the base model, or of a checkpoint of it. Writes nothing."""
    config = context.config
    with ExitStack() as stack:
        display = stack.enter_context(RunDisplay())
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"loading model {config.model.path}")
        model = open_model(config)
        stack.callback(model.close)
        if adapter is not None:
            await model.load(adapter, optimizer=False)
        bench = _bench(stack, config, parts, model, display)
        validate = _validation(config, parts, bench, display, store=lambda step, episodes: None)
        display.stage("eval")
        return await validate(0)


def _bench(
    stack: ExitStack,
    config: AstunerConfig,
    parts: UserParts,
    model: EmbeddedModel,
    display: RunDisplay,
) -> Workbench:
    """The workbench, under the eyes of a watchdog."""
    server = open_server(config, model, open_codec(config, model))
    bench = stack.enter_context(
        workbench(
            config,
            parts,
            server,
            version=lambda: model.version,
            on_episode=display.episode,
        )
    )

    def heartbeat() -> object:
        return model.stats().sampled_tokens

    stack.enter_context(
        Watchdog(lambda: bench.runner.live, heartbeat, after=WATCHDOG_SECONDS, report=display.note)
    )
    return bench


async def _train(
    stack: ExitStack,
    context: RunContext,
    parts: UserParts,
    model: EmbeddedModel,
    bench: Workbench,
    display: RunDisplay,
) -> TrainResult:
    config = context.config
    order = TaskOrder(
        len(parts.tasks.train),
        config.data.train_batch_size,
        config.seed,
        config.task_reader.shuffle,
    )
    settings = TrainSettings.from_config(config, order.steps_per_epoch)
    checkpoints = Checkpoints(
        context.run_dir / "checkpoints", config.trainer_common.keep_checkpoints
    )
    resume_from = checkpoints.latest() if context.resume else None
    resume_step = resume_from.state.step if resume_from else None
    if context.resume:
        where = f"after step {resume_step}" if resume_from else "from the start: no checkpoint yet"
        display.note(f"Resuming {context.run_dir} {where}.")
    sinks = MetricSinks(
        [name for name in config.trainer_common.logger if name != "console"],
        context.run_dir,
        config.project_name,
        config.experiment_name,
        asdict(config),
        resume_step=resume_step,
    )
    stack.callback(sinks.close)
    tokenizer = model.tokenizer
    store = EpisodeStore(context.run_dir, resume_step=resume_step, decode=tokenizer.decode)
    source = _source(config, parts.tasks.train, order, bench, settings)
    try:
        return await train(
            model,
            source,
            _validation(config, parts, bench, display, store=store.append),
            settings,
            checkpoints=checkpoints,
            sinks=sinks,
            episodes=store,
            progress=display,
            stop=context.stop,
            resume_from=resume_from,
        )
    finally:
        await source.aclose()


def _source(
    config: AstunerConfig,
    tasks: Sequence[Task],
    order: TaskOrder,
    bench: Workbench,
    settings: TrainSettings,
) -> GroupSource:
    def tasks_for(step: int) -> list[Task]:
        return [tasks[i] for i in order.indices(step - 1)]  # the trainer counts from 1

    return make_source(
        bench.rollout,
        tasks_for,
        batch_size=config.data.train_batch_size,
        max_staleness=config.rollout.max_staleness,
        total_steps=settings.total_steps,
    )


def _validation(
    config: AstunerConfig,
    parts: UserParts,
    bench: Workbench,
    display: RunDisplay,
    *,
    store: Callable[[int, Sequence[Episode]], None],
) -> Callable[[int], Any]:
    async def validate(step: int) -> EvalResult:
        tasks = parts.tasks.validation
        val = config.rollout.val_kwargs
        display.expect(len(tasks[: val.max_tasks or None]) * val.num_repeat)
        episodes = await bench.rollout.evaluate(tasks, step)
        store(step, episodes)
        return eval_result(episodes)

    return validate


def eval_result(episodes: Sequence[Episode]) -> EvalResult:
    """The score is the success rate where every scored episode says whether it succeeded,
    else the mean reward; failed episodes count as 0."""
    if not episodes:
        return EvalResult(0.0, 0)
    scored = [e for e in episodes if e.ok]
    reward = sum(e.reward or 0.0 for e in scored) / len(episodes)
    metrics = {"reward": reward, "failed": float(len(episodes) - len(scored))}
    if not scored or any(e.is_success is None for e in scored):
        return EvalResult(reward, len(episodes), metrics)
    success = sum(bool(e.is_success) for e in scored) / len(episodes)
    return EvalResult(success, len(episodes), {**metrics, "success_rate": success})


def summarise(context: RunContext, result: TrainResult) -> dict[str, Any]:
    """The content of `summary.json`."""
    totals, config = result.totals, context.config
    before, after = result.eval_before, result.eval_after
    return {
        "backbone": config.backbone,
        "model": config.model.path,
        "steps": result.steps,
        "stopped": result.stopped,
        "eval_before": before.score if before and before.num else None,
        "eval_after": after.score if after and after.num else None,
        "evals": {str(step): e.score for step, e in result.evals.items() if e.num},
        "eval_episodes": after.num if after else before.num if before else 0,
        "train_seconds": round(totals.train_seconds, 3),
        "tokens_sampled": totals.tokens_sampled,
        "tokens_trained": totals.tokens_trained,
        "tokens_masked_by_reason": dict(totals.tokens_masked_by_reason),
        "episodes": totals.episodes,
        "episodes_failed": totals.episodes_failed,
        "steps_skipped": totals.steps_skipped,
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
        "run_dir": str(context.run_dir),
    }


def _finish(context: RunContext, result: TrainResult, summary: Mapping[str, Any]) -> RunResult:
    run_dir = context.run_dir
    write_summary(run_dir, summary)
    places: dict[str, object] = {}
    if curve := learning_curve(run_dir):
        places["learning curve"] = curve
    if result.checkpoint:
        places["tuned adapter"] = result.checkpoint
    places["all facts"] = run_dir / "summary.json"
    places["episodes"] = run_dir / "episodes"
    console = Console()
    console.print(summary_table(summary, places=places))
    console.print(next_commands(_commands(context, result)), soft_wrap=True)
    return RunResult(run_dir, summary, result.checkpoint, result.stopped)


def _commands(context: RunContext, result: TrainResult) -> list[tuple[str, str]]:
    conf = context.loaded.path
    if conf is None or COMMAND_LINE in context.loaded.set_by_user().values():
        conf = context.run_dir / "config.yaml"  # what was overridden is only there
    astuner = executable()
    if result.stopped:
        return [("go on where it stopped", f"{astuner} --conf {conf} --resume")]
    return [
        ("talk to the tuned model", f"{astuner} chat {context.run_dir}"),
        ("score it again", f"{astuner} eval --conf {conf} --adapter {context.run_dir}"),
        ("watch episodes token by token", f"{astuner} --conf {conf} --backbone debug"),
    ]


def executable() -> str:
    """How to type `astuner` here: its path where the environment is not activated."""
    ours = Path(sys.executable).parent / "astuner"
    found = shutil.which("astuner")
    if (found is not None and Path(found) == ours) or not ours.exists():
        return "astuner"
    with suppress(ValueError):
        return str(ours.relative_to(Path.cwd()))
    return str(ours)


def checkpoint_of(path: Path) -> Path:
    """A checkpoint folder, or the newest one of a run folder.

    Raises CheckpointError when there is none.
    """
    if (path / "checkpoints").is_dir():
        latest = Checkpoints(path / "checkpoints").latest()
        if latest is not None:
            return latest.path
    elif (path / "trainer_state.json").exists() or (path / "adapter_config.json").exists():
        return path
    raise CheckpointError(
        f"{path} is neither a run folder with a checkpoint nor a checkpoint folder. "
        "Give the folder that the run's final table names."
    )
