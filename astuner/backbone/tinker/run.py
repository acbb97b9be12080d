"""The `tinker` backbone: rollouts and the training loop here, the model on a service.

Everything is as in `local` but where the model is: one session of the service, opened and
closed here. Episodes, metrics and checkpoints stay in the run's folder; of a checkpoint's
weights only the name, until the adapter is fetched at the end.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from astuner.backbone.assembly import user_parts
from astuner.backbone.context import RunContext, RunResult
from astuner.backbone.report import finish, saved_step
from astuner.backbone.tinker.connection import Connection, Patience
from astuner.backbone.tinker.download import fetch_adapter
from astuner.backbone.tinker.model import TinkerModel, open_model
from astuner.backbone.tinker.translate import check, notes
from astuner.backbone.tuning import open_display, tune
from astuner.config.schema import AstunerConfig
from astuner.errors import AstunerError, ConfigError
from astuner.tracking import RunDisplay
from astuner.trainer import TrainResult


async def run(context: RunContext) -> RunResult:
    """Tune against the service. Raises AstunerError; what was finished until then stays in
    the run folder and on the service."""
    config = context.config
    check(config)
    connection = connect(config)
    with ExitStack() as stack:
        display = open_display(stack, config)
        display.stage("loading workflow and tasks")
        parts = user_parts(context)
        display.stage(f"asking {config.service.base_url}")
        await connection.open({"astuner": f"{config.project_name}/{config.experiment_name}"})
        stack.callback(connection.close)
        model = await open_model(config, connection)
        for note in notes(config):
            display.note(note)
        if not (context.resume and saved_step(context.run_dir, "tinker") is not None):
            await model.begin()
            await model.check_tokenizer(display.note)
        result = await tune(stack, context, parts, model, display)
        model_dir = await _fetched(config, model, result, display)
    return finish(context, result, model_dir=model_dir, what="tuned adapter")


def connect(config: AstunerConfig) -> Connection:
    """Not opened yet. Raises ConfigError without a key, MissingDependency."""
    service = config.service
    key = os.environ.get(service.api_key_env)
    if not key:
        raise ConfigError(
            f"The environment variable {service.api_key_env} (service.api_key_env) is not set: put "
            "the service's key there. `astuner serve` prints its own when it starts."
        )
    return Connection(service.base_url, key, Patience(service.timeout, service.outage_timeout))


async def _fetched(
    config: AstunerConfig, model: TinkerModel, result: TrainResult, display: RunDisplay
) -> Path | None:
    """The last checkpoint's folder, with the adapter in it; None where it stays away."""
    if result.checkpoint is None or not config.service.download:
        return None
    display.stage("fetching the adapter")
    try:
        await fetch_adapter(model, result.checkpoint)
    except AstunerError as error:
        display.note(f"The adapter stays on the service. {error}")
        return None
    return result.checkpoint
