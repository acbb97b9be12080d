"""A run over anything that samples and trains: bench, loop, validation.

The local training loop with its checkpoints, metrics, display and resume, for every
backbone that offers both necks, an `Engine` and a `Policy`, in one object. What is
opened goes onto the caller's stack. Knows no backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from astuner.backbone.assembly import UserParts, Workbench, open_codec, open_server, workbench
from astuner.backbone.context import RunContext
from astuner.backbone.report import CHECKPOINTS, eval_result
from astuner.backbone.sinks import open_sinks
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import Engine, Policy
from astuner.task_reader import TaskOrder
from astuner.task_rollout import GroupSource, Watchdog, make_source
from astuner.tracking import EpisodeStore, RunDisplay
from astuner.trainer import Checkpoints, EvalResult, TrainResult, TrainSettings, train
from astuner.types import Episode, Task

WATCHDOG_SECONDS = 60.0


class Stats(Protocol):
    @property
    def sampled_tokens(self) -> int:
        """So far; grows as long as it works."""
        ...


class Tunable(Engine, Policy, Protocol):
    """What is tuned: it samples, and it is trained."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def version(self) -> int:
        """Of the weights that sample."""
        ...

    def stats(self) -> Stats: ...


def open_display(stack: ExitStack, config: AstunerConfig) -> RunDisplay:
    return stack.enter_context(
        RunDisplay(
            step_lines="console" in config.trainer_common.logger,
            episodes={"rollout": config.data.train_batch_size * config.rollout.num_repeat},
        )
    )


async def tune(
    stack: ExitStack,
    context: RunContext,
    parts: UserParts,
    model: Tunable,
    display: RunDisplay,
) -> TrainResult:
    """Train as the configuration says, or go on with a run. Raises AstunerError; what was
    finished until then stays in the run folder."""
    bench = open_bench(stack, context.config, parts, model, display)
    return await _train(stack, context, parts, model, bench, display)


def open_bench(
    stack: ExitStack,
    config: AstunerConfig,
    parts: UserParts,
    model: Tunable,
    display: RunDisplay,
) -> Workbench:
    """The workbench, under the eyes of a watchdog."""
    server = open_server(config, model, open_codec(config, model.tokenizer))
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
    model: Tunable,
    bench: Workbench,
    display: RunDisplay,
) -> TrainResult:
    config = context.config
    order = TaskOrder.configured(config, len(parts.tasks.train))
    settings = TrainSettings.from_config(config, order.steps_per_epoch)
    checkpoints = Checkpoints(context.run_dir / CHECKPOINTS, config.trainer_common.keep_checkpoints)
    resume_from = checkpoints.latest() if context.resume else None
    resume_step = resume_from.state.step if resume_from else None
    if context.resume:
        where = f"after step {resume_step}" if resume_from else "from the start: no checkpoint yet"
        display.note(f"Resuming {context.run_dir} {where}.")
    sinks = open_sinks(stack, context, resume_step)
    tokenizer = model.tokenizer
    store = EpisodeStore(context.run_dir, resume_step=resume_step, decode=tokenizer.decode)
    source = _source(config, parts.tasks.train, order, bench, settings)
    try:
        return await train(
            model,
            source,
            validation(config, parts, bench, display, store=store.append),
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


def validation(
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
