"""Errors for a person, of what verl's processes left behind when they failed or fell silent."""

from __future__ import annotations

import time
from pathlib import Path

from astuner.backbone.report import saved_step
from astuner.backbone.verl.files import LOG, STACKS, last_sign, read_stage
from astuner.backbone.verl.last_words import last_words
from astuner.backbone.verl.stacks import ask_for_stacks, where_stuck
from astuner.errors import AstunerError, BackboneError, CheckpointError, DeadlineExceeded
from astuner.tracking.display import NAMES
from astuner.tracking.summary import duration

KILLED = 137
DISK_FULL = "No space left on device"
TRAINER = "WatchedTaskRunner"
"""In the title of the process that verl's trainer runs in."""


def failure(folder: Path, code: int) -> AstunerError:
    """Why the command ended with an exit code other than 0."""
    words = last_words(folder / LOG)
    hint = " (killed: out of memory?)" if code == KILLED else ""
    message = (
        f"verl failed{_where(folder)}, exit code {code}{hint}:\n{words}\n"
        f"Everything it printed: {folder / LOG}. {_saved(folder)}"
    )
    return (CheckpointError if DISK_FULL in words else BackboneError)(message)


def stalled(folder: Path, seconds: float) -> DeadlineExceeded:
    """What was going on when nothing went on any more; makes the processes tell."""
    stacks = ask_for_stacks(folder)
    frames = where_stuck(stacks, TRAINER)
    at, what = last_sign(folder)
    ago = f"\nIts last sign, {duration(time.time() - at)} ago: {what}." if what else ""
    there = f"\nThe trainer is in:\n{frames}" if frames else ""
    where = f"\nThe stacks of its processes: {folder / STACKS}." if stacks else ""
    return DeadlineExceeded(
        f"verl has shown no sign of life for {duration(seconds)}{_where(folder)}.{ago}{there}"
        f"{where}\nEverything it printed: {folder / LOG}. It was ended. {_saved(folder)} If it was "
        "only slow, raise trainer_common.stall_timeout."
    )


def _where(folder: Path) -> str:
    stage = read_stage(folder)
    if stage is None:
        return ""
    step = f" in step {stage.step} of {stage.total}" if stage.total else ""
    return f" while {NAMES.get(stage.name, stage.name)}{step}"


def _saved(folder: Path) -> str:
    step = saved_step(folder.parent, "verl")
    if step is None:
        return "No checkpoint was saved yet."
    return f"Step {step} is saved: go on with --resume."
