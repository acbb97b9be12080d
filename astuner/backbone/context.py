"""What a backbone is given and what it gives back.

A backbone is one function `run(context) -> RunResult`, named in `BACKBONES`. It
owns everything it starts and closes it before it returns. How the process is
started, signals and exit codes are the launcher's business.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astuner.config.load import LoadedConfig
from astuner.config.schema import AstunerConfig
from astuner.task_reader import TaskSplits

BACKBONES = {
    "local": "astuner.backbone.local:run",
    "debug": "astuner.backbone.debug:run",
    "verl": "astuner.backbone.verl.run:run",
    "trinity": "astuner.backbone.trinity.run:run",
    "tinker": "astuner.backbone.tinker.run:run",
}


@dataclass(frozen=True)
class RunContext:
    """One run: the configuration, and what was given as Python objects instead of names."""

    loaded: LoadedConfig
    run_dir: Path
    workflow: type | None = None
    judge: Any = None
    tasks: TaskSplits | None = None
    resume: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    """Set by the first Ctrl-C: finish or abandon the step, save, return."""

    @property
    def config(self) -> AstunerConfig:
        return self.loaded.config


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    summary: Mapping[str, Any]
    """The content of `summary.json`."""
    model_dir: Path | None
    """The tuned adapter (or model) folder; None when nothing was trained."""
    stopped: bool = False
    """True when it was interrupted before its last step."""
