"""Deletes those of verl's checkpoints that are not to stay (`spawned.keeping`).

Runs in the trainer's process, after each save. verl finds the class by its name
(`trainer.checkpoint_callback_class`).
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from astuner.backbone.spawned.files import folder_of_process, read_job
from astuner.backbone.spawned.keeping import steps_in, surplus

log = logging.getLogger(__name__)


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


def delete(folder: Path) -> None:
    """Under another name first, so that a half-deleted one is never taken for whole."""
    doomed = folder.with_name(f"deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
