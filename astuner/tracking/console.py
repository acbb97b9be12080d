"""One readable line a step for the terminal: the figures one looks at first.

The columns are fixed and short; everything else is in `metrics.jsonl`. Who prints
the line, and where, is `display`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward/mean", "reward", ".3f"),
    ("policy/loss", "loss", ".4f"),
    ("policy/grad_norm", "grad", ".3g"),
    ("policy/entropy", "entropy", ".3f"),
    ("tokens/trained", "trained", ",.0f"),
    ("staleness/mean", "stale", ".2f"),
    ("episodes/failed", "failed", ".0f"),
    ("seconds/step", "seconds", ".1f"),
    ("speed/sampled_tokens_per_second", "tok/s", ",.0f"),
)
"""Metric, heading, format. What is missing from a step, and zero failures, are left out."""


def line(step: int, metrics: Mapping[str, float]) -> Text:
    """The step as one line, e.g. "step   12  reward 0.431  loss -0.0021  grad 0.83"."""
    text = Text.assemble(("step ", "dim"), (f"{step:>4}", "bold"))
    for name, heading, form in COLUMNS:
        value = metrics.get(name)
        if value is None or (value == 0 and name in ("episodes/failed", "staleness/mean")):
            continue
        style = {"reward": "green", "failed": "red"}.get(heading, "")
        text.append(f"  {heading} ", "dim").append(format(value, form), style)
        if name == "reward/mean":
            for target, reward in target_rewards(metrics).items():
                text.append(f"  {target} ", "dim").append(format(reward, form), style)
    return text


def target_rewards(metrics: Mapping[str, float]) -> dict[str, float]:
    """The mean reward of each target, where there are such."""
    parts = ((name.split("/"), value) for name, value in metrics.items())
    return {p[1]: v for p, v in parts if len(p) == 3 and p[0] == "reward" and p[2] == "mean"}
