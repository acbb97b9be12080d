"""Where metrics and episodes go: console, files and experiment trackers. Names are loaded
on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astuner.tracking.curve import learning_curve
    from astuner.tracking.display import RunDisplay
    from astuner.tracking.episodes import EpisodeStore, read_episodes
    from astuner.tracking.metrics_file import read_metrics
    from astuner.tracking.sinks import SINKS, MetricSinks
    from astuner.tracking.summary import next_commands, summary_table, write_summary
    from astuner.tracking.token_view import colored_tokens, legend

_HOME = {
    "SINKS": "sinks",
    "EpisodeStore": "episodes",
    "MetricSinks": "sinks",
    "RunDisplay": "display",
    "colored_tokens": "token_view",
    "learning_curve": "curve",
    "legend": "token_view",
    "next_commands": "summary",
    "read_episodes": "episodes",
    "read_metrics": "metrics_file",
    "summary_table": "summary",
    "write_summary": "summary",
}
__all__ = [
    "SINKS",
    "EpisodeStore",
    "MetricSinks",
    "RunDisplay",
    "colored_tokens",
    "learning_curve",
    "legend",
    "next_commands",
    "read_episodes",
    "read_metrics",
    "summary_table",
    "write_summary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
