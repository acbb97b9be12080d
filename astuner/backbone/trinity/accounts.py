"""What Trinity's processes note for the launcher besides what `spawned` has: the metrics of its
roles, as JSON Lines. No Trinity here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
