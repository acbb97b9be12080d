"""A JSON Lines file that another process is still writing, read as it grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class LineReader:
    """Gives each whole line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """The lines that were finished since the last call; none before the file exists."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
