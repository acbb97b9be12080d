"""verl's task runner, watched: it says where the trainer is, and ends it when asked to.

A thread beside verl's own `run` looks at the trainer's attributes a few times a second
and changes nothing, until the stop file is there: then the running step becomes the last
one, which verl saves. No method of any trainer is replaced.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from verl.trainer.main_ppo import TaskRunnerV1  # pyright: ignore[reportMissingImports]

from astuner.backbone.spawned.files import STOP, Stage, folder_of_process, write_stage
from astuner.backbone.verl.trainer_stage import stage_of

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
# Ray wraps the class that it is given; the wrapped one cannot be inherited from.
_Base: Any = TaskRunnerV1.__ray_metadata__.modified_class.__ray_actor_class__


class WatchedTaskRunner(_Base):
    """Runs verl's trainer."""

    def run(self, config: Any) -> None:
        """As verl's own."""
        ended = threading.Event()
        watch = threading.Thread(
            target=self._watch, args=(folder_of_process(), ended), name="astuner", daemon=True
        )
        watch.start()
        try:
            super().run(config)
        finally:
            ended.set()
            watch.join()

    def _watch(self, folder: Path, ended: threading.Event) -> None:
        shown: Stage | None = None
        stopping = False
        while not ended.wait(POLL_SECONDS):
            stage = stage_of(self.trainer)
            if stage != shown and _shown(folder, stage):
                shown = stage
            if not stopping and (folder / STOP).exists():
                stopping = stop_after_step(self.trainer)


def _shown(folder: Path, stage: Stage) -> bool:
    """A folder that cannot be written for a moment must not end the watch."""
    try:
        write_stage(folder, stage)
    except OSError as error:
        log.warning("Where the trainer is cannot be written: %s", error)
        return False
    return True


def stop_after_step(trainer: Any) -> bool:
    """Make the running step the last, saved and not validated. False where it is too late for
    that in this step, or too early: ask again."""
    if not hasattr(trainer, "logger") or "update_actor" in getattr(trainer, "timing_raw", ()):
        return False
    trainer.config.trainer.save_freq = 1
    trainer.config.trainer.test_freq = 0
    trainer.total_training_steps = trainer.global_steps
    return True


def task_runner_class() -> Any:
    """For verl's `run_ppo`."""
    return ray.remote(WatchedTaskRunner)
