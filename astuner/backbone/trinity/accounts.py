"""What Trinity's processes note for the launcher besides `spawned.files`: which groups a
step was trained on, and the metrics of its roles, as JSON Lines. No Trinity here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCHES = "batches.jsonl"


@dataclass(frozen=True)
class BatchRecord:
    """The groups of one step of the trainer."""

    step: int
    groups: tuple[str, ...]
    """By their ids."""
    stale: tuple[str, ...] = ()
    """Those that were left out because they were too old."""


def note_batch(folder: Path, record: BatchRecord) -> None:
    _append(folder / BATCHES, asdict(record))


def batch_record(line: Mapping[str, Any]) -> BatchRecord:
    """From a line of the file."""
    return BatchRecord(int(line["step"]), tuple(line["groups"]), tuple(line["stale"]))


def role_file(role: str) -> str:
    """Of the metrics of Trinity's trainer, explorer ..."""
    return f"metrics-{role}.jsonl"


def note_metrics(folder: Path, role: str, step: int, data: Mapping[str, Any]) -> None:
    """Numbers only."""
    numbers = {k: float(v) for k, v in data.items() if _is_number(v)}
    _append(folder / role_file(role), {"step": step, "data": numbers})


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str | bool)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
