"""One episode: run the workflow, judge it, track its calls. Names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astuner.task_runner.live import LiveEpisode
    from astuner.task_runner.runner import EpisodeRunner, RunnerSettings
    from astuner.task_runner.workflow import Workflow, check_workflow

_HOME = {
    "EpisodeRunner": "runner",
    "LiveEpisode": "live",
    "RunnerSettings": "runner",
    "Workflow": "workflow",
    "check_workflow": "workflow",
}
__all__ = ["EpisodeRunner", "LiveEpisode", "RunnerSettings", "Workflow", "check_workflow"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
