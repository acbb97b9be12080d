"""`learning_curve.png`: training reward (of each target too) and held-out score over the steps.

Drawn from `metrics.jsonl` alone, so it can be drawn of any run, also an unfinished
one. Without matplotlib, or with nothing to draw, it says so and returns None: a
picture never fails a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from astuner.tracking.console import target_rewards
from astuner.tracking.metrics_file import read_metrics

log = logging.getLogger(__name__)
REWARD, HELD_OUT = "reward/mean", "eval/score"
INK, BLUE, ORANGE = "#333333", "#4c78a8", "#e45756"
OTHERS = ("#54a24b", "#b279a2", "#eeca3b", "#9d755d")
"""Of targets, in the order of their names."""


def learning_curve(run_dir: Path) -> Path | None:
    """Draw the curve into the run's folder and return its path, or None with a log line."""
    metrics = run_dir / "metrics.jsonl"
    steps = read_metrics(metrics) if metrics.exists() else {}
    if not any(REWARD in m or HELD_OUT in m for m in steps.values()):
        log.info("No learning curve: %s has no rewards yet.", metrics)
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        log.warning('No learning curve: matplotlib is missing (pip install "astuner[plot]").')
        return None
    figure: Any = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure.add_subplot(), steps, run_dir.name)
    path = run_dir / "learning_curve.png"
    temporary = run_dir / ".learning_curve.png"
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    except OSError as error:
        log.warning("No learning curve: %s cannot be written (%s).", path, error)
        return None
    return path


def _draw(axes: Any, steps: Mapping[int, Mapping[str, float]], title: str) -> None:
    reward = [(step, m[REWARD]) for step, m in steps.items() if REWARD in m]
    held_out = [(step, m[HELD_OUT]) for step, m in steps.items() if HELD_OUT in m]
    if reward:
        x, y = zip(*reward, strict=True)
        axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(x, smooth(y), color=BLUE, linewidth=2, label="training reward (mean, smoothed)")
    for color, (target, points) in zip(cycle(OTHERS), curve_targets(steps).items(), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, smooth(y), color=color, linewidth=1.2, label=f"reward of {target}")
    if held_out:
        x, y = zip(*held_out, strict=True)
        axes.plot(x, y, "o--", color=ORANGE, linewidth=1.2, markersize=6, label="held-out score")
        for step, score in (held_out[0], held_out[-1]) if len(held_out) > 1 else held_out:
            axes.annotate(
                f"{score:.2f}",
                (step, score),
                textcoords="offset points",
                xytext=(0, 9),
                ha="center",
                color=ORANGE,
                weight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    axes.set_title(title, loc="left", color=INK, weight="bold")
    axes.set_xlabel("training step", color=INK)
    axes.margins(x=0.03, y=0.15)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)


def curve_targets(steps: Mapping[int, Mapping[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Target -> (step, mean reward), where rewards were given by target."""
    points: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in steps.items():
        for target, reward in target_rewards(metrics).items():
            points.setdefault(target, []).append((step, reward))
    return dict(sorted(points.items()))


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential moving average without the bias of its start (Kingma and Ba 2015, sec. 3)."""
    smoothed: list[float] = []
    average = 0.0
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**n))
    return smoothed
