"""Where the configuration sends a run's metrics, whatever backbone trains."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

from astuner.backbone.context import RunContext
from astuner.tracking import MetricSinks


def open_sinks(stack: ExitStack, context: RunContext, resume_step: int | None) -> MetricSinks:
    """Those that it names, to be closed by `stack`; what a resumed run had logged of steps after
    `resume_step` is forgotten."""
    config = context.config
    sinks = MetricSinks(
        [name for name in config.trainer_common.logger if name != "console"],
        context.run_dir,
        config.project_name,
        config.experiment_name,
        asdict(config),
        resume_step=resume_step,
    )
    stack.callback(sinks.close)
    return sinks
