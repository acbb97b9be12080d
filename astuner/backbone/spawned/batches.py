"""Which groups a step of a spawned trainer was trained on, as JSON Lines in the run's folder.

The trainer's process notes each batch when it has been put together, the launcher reads it.
A step of several mini-batches may have several lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BATCHES = "batches.jsonl"


@dataclass(frozen=True)
class BatchRecord:
    """What was taken for one step of the trainer."""

    step: int
    groups: tuple[str, ...]
    """By the names that the trainer has for them."""
    left_out: tuple[str, ...] = ()
    """Those that were thrown away meanwhile: too old, or nothing came of them."""


def note_batch(folder: Path, record: BatchRecord) -> None:
    """Raises OSError."""
    with (folder / BATCHES).open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def batch_record(line: Mapping[str, Any]) -> BatchRecord:
    """From a line of the file."""
    return BatchRecord(int(line["step"]), tuple(line["groups"]), tuple(line["left_out"]))


def forget_batches(folder: Path, after: int) -> None:
    """Those of later steps, which a resumed run takes again; and a line that a kill has torn."""
    path = folder / BATCHES
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(li for li in whole if json.loads(li)["step"] <= after))
    temporary.replace(path)
