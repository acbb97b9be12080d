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
    return text
