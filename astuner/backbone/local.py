"""The `local` backbone: everything embedded in one process, on one CPU or GPU.

Rollouts, the proxy and training share one embedded model. Also evaluates a model
without training (`astuner eval`). Owns what it starts; leaves a run folder behind.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from astuner.backbone.assembly import UserParts, open_model, user_parts
from astuner.backbone.context import RunContext, RunResult
from astuner.backbone.report import finish, is_whole_model
from astuner.backbone.targets import check_targets, open_team
from astuner.backbone.tinker.download import as_fetched
from astuner.backbone.tuning import open_bench, open_display, tune, validation
from astuner.config.schema import AstunerConfig
from astuner.config.targets import needs_host
from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.team import Team
from astuner.task_runner.workflow import declared_targets
from astuner.tracking import RunDisplay
from astuner.trainer import EvalResult


async def run(context: RunContext) -> RunResult:
    """Tune, and write `summary.json`, the learning curve, episodes and checkpoints.

    Raises AstunerError; what was finished until then stays in the run folder.
    """
    config = context.config
    with ExitStack() as stack:
        display = open_display(stack, config)
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"loading model {config.model.path}")
        model = await open_all(config, parts)
        stack.callback(model.close)
        result = await tune(stack, context, parts, model, display)
    return finish(context, result, model_dir=result.checkpoint, what="tuned adapter")


async def evaluate(context: RunContext, checkpoint: Path | None) -> EvalResult:
    """The held-out score of the base model, or of tuned weights. Writes nothing."""
    config = context.config
    with ExitStack() as stack:
        display = stack.enter_context(RunDisplay())
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"loading model {config.model.path}")
        model = await open_all(config, parts, checkpoint)
        stack.callback(model.close)
        bench = open_bench(stack, config, parts, model, display)
        validate = validation(config, parts, bench, display, store=lambda step, episodes: None)
        display.stage("eval")
        return await validate(0)


async def open_all(
    config: AstunerConfig, parts: UserParts, checkpoint: Path | None = None
) -> EmbeddedModel | Team:
    """Whatever the run trains and samples: one model, or a team of adapters over it, with the
    weights of a checkpoint; the caller closes it. Raises ConfigError where configuration and
    workflow contradict each other about targets, CheckpointError or ModelError."""
    declared = declared_targets(parts.workflow)
    check_targets(config, declared)
    if not needs_host(config):
        return await open_tuned(config, checkpoint)
    team = await open_team(config, declared)
    if checkpoint is not None:
        try:
            await team.load(checkpoint, optimizer=False)
        except BaseException:
            team.close()
            raise
    return team


async def open_tuned(config: AstunerConfig, checkpoint: Path | None) -> EmbeddedModel:
    """The configured model with the weights of a folder: a checkpoint of it, or a whole
    model; the caller closes it. Raises CheckpointError or ModelError."""
    if checkpoint is not None and is_whole_model(checkpoint):
        return open_model(replace(config, model=replace(config.model, path=str(checkpoint))))
    model = open_model(as_fetched(config, checkpoint))
    if checkpoint is not None:
        try:
            await model.load(checkpoint, optimizer=False)
        except BaseException:
            model.close()
            raise
    return model
