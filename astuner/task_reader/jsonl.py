"""JSON Lines files: one object a line; blank lines do not count.

Every complaint names file and line. A relative path is taken from the working
directory. Nothing but the files is read.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astuner.config.schema import TaskReaderConfig
from astuner.errors import DataError
from astuner.task_reader.reader import TaskSplits
from astuner.task_reader.rows import tasks_from_rows
from astuner.types import Task


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """Both files as Tasks. Raises DataError."""
    files = config.jsonl_dataset_file
    if not files.training.file_path:
        raise DataError(
            "No training file is set: give astuner.task_reader.jsonl_dataset_file."
            "training.file_path."
        )
    validation = files.validation.file_path
    return TaskSplits(
        _tasks(files.training.file_path, config), _tasks(validation, config) if validation else []
    )


def _tasks(file_path: str, config: TaskReaderConfig) -> list[Task]:
    tasks = tasks_from_rows(rows_of(Path(file_path).expanduser()), config.fields)
    if not tasks:
        raise DataError(f"{file_path} has no rows. It should hold one JSON object a line.")
    return tasks


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) for each line that is not blank. Raises DataError."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, path, number)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, (p.name for p in path.parent.glob("*")))
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"There is no dataset file {path.absolute()}.{hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        hint = "one JSON object must stand on each line"
        if number == 1 and line.lstrip()[:1] in "[{":
            hint += "; this looks like one JSON document over many lines"
        raise DataError(
            f"{path}:{number}: not valid JSON at column {error.colno} ({error.msg}): "
            f"{line.strip()[:80]!r}; {hint}."
        ) from None
