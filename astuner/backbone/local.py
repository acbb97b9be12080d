"""The `local` backbone: everything embedded in one process, on one CPU or GPU.

Rollouts, the proxy and training share one embedded model. Also evaluates a model
without training (`astuner eval`). Owns what it starts; leaves a run folder behind.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from astuner.backbone.assembly import open_model, user_parts
from astuner.backbone.context import RunContext, RunResult
from astuner.backbone.report import finish, is_whole_model
from astuner.backbone.tuning import open_bench, open_display, tune, validation
from astuner.config.schema import AstunerConfig
from astuner.engine.embedded.model import EmbeddedModel
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
        model = open_model(config)
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
        model = await open_tuned(config, checkpoint)
        stack.callback(model.close)
        bench = open_bench(stack, config, parts, model, display)
        validate = validation(config, parts, bench, display, store=lambda step, episodes: None)
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
