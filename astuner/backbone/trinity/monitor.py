"""Trinity's monitor (`monitor.monitor_type`): one file of lines for each role.

The launcher reads them and passes them on to the run's own sinks.
"""

from __future__ import annotations

from typing import Any

from trinity.utils.monitor import Monitor  # pyright: ignore[reportMissingImports]

from astuner.backbone.spawned.files import folder_of_process
from astuner.backbone.trinity.accounts import note_metrics


class Lines(Monitor):  # pyright: ignore[reportUntypedBaseClass]
    """Found by its dotted path."""

    def __init__(self, project: str, group: str, name: str, role: str, config: Any = None) -> None:
        super().__init__(project, name, role, config)
        self._folder = folder_of_process()

    def log(self, data: dict[str, Any], step: int, commit: bool = False) -> None:
        note_metrics(self._folder, self.role, step, data)

    def close(self) -> None:
        """Nothing is open."""
