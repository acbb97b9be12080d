"""The `local` backbone: everything embedded in one process, on one CPU or GPU.

Rollouts, the proxy and training share one embedded model. Also evaluates a model
without training (`astuner eval`). Owns what it starts; leaves a run folder behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
from astuner.backbone.report import CHECKPOINTS, eval_result, finish, is_whole_model
from astuner.config.schema import AstunerConfig
from astuner.engine.embedded.model import EmbeddedModel
from astuner.task_reader import TaskOrder
from astuner.task_rollout import GroupSource, Watchdog, make_source
from astuner.tracking import (
    EpisodeStore,
    MetricSinks,
    RunDisplay,
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
    return finish(context, result, model_dir=result.checkpoint, what="tuned adapter")


async def evaluate(context: RunContext, checkpoint: Path | None) -> EvalResult:
    """The held-out score of the base model, or of tuned weights. Writes nothing."""
    config = context.config
    with ExitStack() as stack:
        display = stack.enter_context(RunDisplay())
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"loading model {config.model.path}")
        model = await open_tuned(config, checkpoint)
        stack.callback(model.close)
        bench = _bench(stack, config, parts, model, display)
        validate = _validation(config, parts, bench, display, store=lambda step, episodes: None)
        display.stage("eval")
        return await validate(0)


async def open_tuned(config: AstunerConfig, checkpoint: Path | None) -> EmbeddedModel:
    """The configured model with the weights of a folder: a checkpoint of it, or a whole
    model; the caller closes it. Raises CheckpointError or ModelError."""
    if checkpoint is not None and is_whole_model(checkpoint):
        return open_model(replace(config, model=replace(config.model, path=str(checkpoint))))
    model = open_model(config)
    if checkpoint is not None:
        try:
            await model.load(checkpoint, optimizer=False)
        except BaseException:
            model.close()
            raise
    return model


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
    checkpoints = Checkpoints(context.run_dir / CHECKPOINTS, config.trainer_common.keep_checkpoints)
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
