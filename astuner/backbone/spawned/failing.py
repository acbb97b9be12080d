"""Errors for a person, of what a trainer's processes left behind when they failed or hung."""

from __future__ import annotations

import time
from pathlib import Path

from astuner.backbone.report import saved_step
from astuner.backbone.spawned.files import STACKS, last_sign, read_stage
from astuner.backbone.spawned.last_words import last_words
from astuner.backbone.spawned.program import Program
from astuner.backbone.spawned.stacks import ask_for_stacks, where_stuck
from astuner.errors import AstunerError, BackboneError, CheckpointError, DeadlineExceeded
from astuner.tracking.display import NAMES
from astuner.tracking.summary import duration

KILLED = 137
DISK_FULL = "No space left on device"


def failure(program: Program, folder: Path, code: int) -> AstunerError:
    """Why the command ended with an exit code other than 0."""
    words = last_words(folder / program.log)
    hint = " (killed: out of memory?)" if code == KILLED else ""
    message = (
        f"{program.name} failed{_where(folder)}, exit code {code}{hint}:\n{words}\n"
        f"Everything it printed: {folder / program.log}. {_saved(program, folder)}"
    )
    return (CheckpointError if DISK_FULL in words else BackboneError)(message)


def stalled(program: Program, folder: Path, seconds: float) -> DeadlineExceeded:
    """What was going on when nothing went on any more; makes the processes tell."""
    stacks = ask_for_stacks(folder)
    frames = where_stuck(stacks, program.trainer)
    at, what = last_sign(folder)
    ago = f"\nIts last sign, {duration(time.time() - at)} ago: {what}." if what else ""
    there = f"\nThe trainer is in:\n{frames}" if frames else ""
    where = f"\nThe stacks of its processes: {folder / STACKS}." if stacks else ""
    return DeadlineExceeded(
        f"{program.name} has shown no sign of life for {duration(seconds)}{_where(folder)}.{ago}"
        f"{there}{where}\nEverything it printed: {folder / program.log}. It was ended. "
        f"{_saved(program, folder)} If it was only slow, raise trainer_common.stall_timeout."
    )


def _where(folder: Path) -> str:
    stage = read_stage(folder)
    if stage is None:
        return ""
    step = f" in step {stage.step} of {stage.total}" if stage.total else ""
    return f" while {NAMES.get(stage.name, stage.name)}{step}"


def _saved(program: Program, folder: Path) -> str:
    step = saved_step(folder.parent, program.name)
    if step is None:
        return "No checkpoint was saved yet."
    return f"Step {step} is saved: go on with --resume."
