"""Everything that is worked around in Trinity-RFT 0.6.0 by other means than a public setting
would be chosen for; each with the line in question.

Nothing of Trinity is edited or replaced. Three more stand where they act: `final`,
`served_weights`, `surplus`. `tests/backbone/trinity/test_workarounds.py` has a test for each
that fails when Trinity no longer needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

IN_MEMORY: Mapping[str, Any] = {"synchronizer.sync_method": "memory"}
"""On a service. With "checkpoint" (what Trinity chooses, common/config_validator.py:549) the
trainer leaves out the weight sync of a step that it saves (trainer/trainer.py:139), but on
a service the save does not leave the sampler's weights (tinker_trainer.py:338), so that the
explorer waits for them until its time-out."""

BREAKS = ("Error in Trainer:", "Error in Explorer:")
"""What the two print when they end their loop because of an exception (trainer/trainer.py:172,
explorer/explorer.py:300). Trinity then waits for the other one as long as its time-outs
allow, and reports success."""


class Breaks:
    """Reads a growing log for them."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0

    def found(self) -> bool:
        """Whether one was printed since the last call."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return False
        self._offset += len(new)
        text = new.decode(errors="replace")
        return any(words in text for words in BREAKS)
