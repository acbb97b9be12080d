"""What the launcher asks and says before it starts a trainer's processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astuner.backbone.context import RunContext
from astuner.tracking import RunDisplay


def shown(context: RunContext) -> dict[str, Any]:
    """Keywords of `RunDisplay`."""
    config = context.config
    episodes = {"rollout": config.data.train_batch_size * config.rollout.num_repeat}
    return {"step_lines": "console" in config.trainer_common.logger, "episodes": episodes}


def context_of(model: Path) -> int:
    """The model's own limit, in tokens."""
    from transformers import AutoConfig

    from astuner.engine.embedded.compatible import context_length

    return context_length(AutoConfig.from_pretrained(model, local_files_only=True))


def tell(
    context: RunContext,
    display: RunDisplay,
    warnings: Sequence[str],
    *,
    step: int,
    resumes: bool,
    changed: str | None,
) -> None:
    """The backbone's warnings, where a resumed run goes on (after `step`), and what is
    different from when it began."""
    for note in warnings:
        display.note(note)
    if context.resume:
        where = f"after step {step}" if resumes else "from the start: no checkpoint yet"
        display.note(f"Resuming {context.run_dir} {where}.")
    if changed:
        display.note(changed)
