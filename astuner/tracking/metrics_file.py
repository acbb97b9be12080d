"""`metrics.jsonl`: one JSON object a line, `{"step": 3, "time": ..., "reward/mean": ...}`.

Each line is flushed as it is written, so that it survives a SIGKILL of the process. A
step may have several lines (e.g. a validation after its training); readers merge
them with `read_metrics`. NaN and infinities are written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast


class MetricsFile:
    """Appends to the file, which is touched by the first `log` only. `resume_step` None then
    puts an existing file aside as `metrics.jsonl.old`; a number keeps the lines up to it."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        self._resume_step = resume_step
        self._file: TextIO | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line, through to the operating system."""
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in metrics.items()}
        self._file = self._file or self._open()
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._resume_step is None:
            self._path.replace(self._path.with_name(self._path.name + ".old"))
        elif self._path.exists() and self._resume_step is not None:
            _truncate(self._path, self._resume_step)
        return self._path.open("a", encoding="utf-8")


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics, in order of the steps; later lines of a step add to earlier ones."""
    steps: dict[int, dict[str, float]] = {}
    for _, row in _rows(path):
        step = steps.setdefault(int(row.pop("step")), {})
        step.update({name: value for name, value in row.items() if value is not None})
    return dict(sorted(steps.items()))


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line torn by a kill goes too."""
    kept = "".join(line for line, row in _rows(path) if row["step"] <= step)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(kept, encoding="utf-8")
    os.replace(temporary, path)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines and what they say."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line) if line.endswith("\n") else None
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                yield line, cast(dict[str, Any], row)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
