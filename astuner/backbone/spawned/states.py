"""What was known after each step, so that a resumed run counts on from its checkpoint.

One JSON line a step in the run's folder of the spawned processes; only the launcher writes.
A checkpoint may be older than the last line, and then later lines are forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from astuner.trainer.checkpoints import TrainerState

STATES = "states.jsonl"


def keep_state(folder: Path, state: TrainerState) -> None:
    """Raises OSError."""
    with (folder / STATES).open("a") as states:
        states.write(_line(state))


def state_at(folder: Path, step: int, fresh: TrainerState) -> TrainerState:
    """What was known after a step, or the nearest step before it; forgets what came later."""
    return replace(last_known(folder, step) or fresh, step=step)


def last_known(folder: Path, step: int) -> TrainerState | None:
    """The state after the last step up to this one that was reported; forgets what came later."""
    path = folder / STATES
    kept = [state for state in _states(path) if state.step <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(_line, kept)))
    temporary.replace(path)
    return kept[-1] if kept else None


def _states(path: Path) -> Iterator[TrainerState]:
    """Whole lines only: a kill may tear the last."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield TrainerState.from_json(line)
        except (ValueError, KeyError, TypeError):
            continue


def _line(state: TrainerState) -> str:
    return json.dumps(json.loads(state.to_json())) + "\n"
