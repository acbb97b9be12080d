"""What is left of a run at its end: `summary.json`, and a table for the terminal.

The caller decides what is in the summary; this module writes it so that a kill leaves
either the old file or the new one, and shows the figures a person asks for first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write run_dir/summary.json under a temporary name, then rename it."""
    path = run_dir / "summary.json"
    temporary = run_dir / ".summary.json.tmp"
    temporary.write_text(json.dumps(dict(summary), indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def summary_table(
    summary: Mapping[str, Any],
    *,
    places: Mapping[str, object] | None = None,
) -> Panel:
    """Held-out score before and after, the run's figures, where things are.

    `summary` has the keys of `summary.json`, any of which may be missing; `places` is
    what -> where.
    """
    parts: list[Any] = [_scores(summary), Text(), _figures(summary)]
    if places:
        rows = Table.grid(padding=(0, 2))
        for what, where in places.items():
            rows.add_row(Text(what, "dim"), Text(str(where), overflow="fold"))
        parts += [Text(), rows]
    title = f"{summary.get('model', 'run')} tuned" if summary.get("steps") else "run"
    return Panel(Group(*parts), title=title, title_align="left", border_style="green", expand=False)


def next_commands(commands: Sequence[tuple[str, str]]) -> Text:
    """(what it does, command) as lines to copy: print them with `soft_wrap`, unframed."""
    text = Text("Next", "bold")
    for what, command in commands:
        text.append(f"\n  # {what}\n", "not bold dim").append(f"  {command}", "not bold cyan")
    return text


def _scores(summary: Mapping[str, Any]) -> Table:
    before, after = score(summary.get("eval_before")), score(summary.get("eval_after"))
    table = Table(show_header=True, header_style="dim", box=None, padding=(0, 3, 0, 0))
    table.add_column("", style="dim")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    change = ""
    if before is not None and after is not None:
        style = "green" if after > before else "red" if after < before else "dim"
        change = Text(f"{after - before:+.3f}", style)
    table.add_row("held-out score", _number(before), Text(_number(after), "bold"), change)
    return table


def _figures(summary: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    seconds = summary.get("train_seconds")
    rows: dict[str, str | None] = {
        "steps": _count(summary.get("steps")),
        "training time": None if seconds is None else duration(float(seconds)),
        "tokens sampled": _count(summary.get("tokens_sampled")),
        "tokens trained": _count(summary.get("tokens_trained")),
        "tokens not trained": _reasons(summary.get("tokens_masked_by_reason")),
        "episodes failed": _count(summary.get("episodes_failed") or None),
    }
    for what, value in rows.items():
        if value is not None:
            grid.add_row(Text(what, "dim"), value)
    return grid


def score(result: object) -> float | None:
    """The score in a summary's `eval_before`: a number, or a mapping with "score"."""
    if isinstance(result, Mapping):
        result = cast(Mapping[str, object], result).get("score")
    return float(result) if isinstance(result, int | float) else None


def duration(seconds: float) -> str:
    """ "42 s", "3 min 19 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int | float) else None


def _reasons(masked: object) -> str | None:
    if not isinstance(masked, Mapping) or not masked:
        return None
    counts = cast(Mapping[str, int], masked)
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered if count)
