"""Which of verl's checkpoints stay: the lasting ones, and the newest to resume from.

verl saves at one interval and can keep the last few. astuner has two intervals
(`save_freq`, of which `keep_checkpoints` last, and `resume_freq`, of which only the newest
stays), so verl saves at both and this deletes the surplus, in the trainer's process, after
each save. verl finds the class by its name (`trainer.checkpoint_callback_class`).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from astuner.backbone.spawned.files import folder_of_process, read_job

log = logging.getLogger(__name__)
_FOLDER = re.compile(r"global_step_(\d+)")


class OnlyWanted:
    """verl's CheckpointCallback, by shape."""

    def __init__(self, config: Any) -> None:
        """`config` is verl's. The last step is the one planned, wherever the run is stopped."""
        trainer = read_job(folder_of_process()).config.trainer_common
        self._every, self._keep = trainer.save_freq, trainer.keep_checkpoints
        self._last = int(config.trainer.total_training_steps or 0)

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        """Called when the checkpoint of this step is whole. Never raises OSError: a folder
        that cannot be deleted costs room, not the run."""
        folder = Path(checkpoint_dir).parent
        for step in surplus(
            steps_in(folder),
            global_step,
            every=self._every,
            keep=self._keep,
            last=self._last,
        ):
            try:
                delete(folder / f"global_step_{step}")
            except OSError as error:
                log.warning("An old checkpoint cannot be deleted: %s", error)


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    found = (_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def surplus(steps: Iterable[int], now: int, *, every: int, keep: int, last: int) -> list[int]:
    """Steps whose checkpoints go, after that of step `now` was saved.

    Lasting are those of every `every` steps (0: none) and of the `last` step; the newest
    `keep` of them stay (0: all). Of the others only `now` does. Later ones than `now` are of
    a run that was wound back, and are left alone.
    """
    upto = sorted(step for step in steps if step <= now)
    lasting = [step for step in upto if step == last or (every > 0 and step % every == 0)]
    gone = lasting[:-keep] if keep else []
    return sorted([*gone, *(step for step in upto if step not in lasting and step != now)])


def delete(folder: Path) -> None:
    """Under another name first, so that a half-deleted one is never taken for whole."""
    doomed = folder.with_name(f"deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
