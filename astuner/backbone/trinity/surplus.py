"""Deletes those of Trinity's checkpoints that are not to stay (`spawned.keeping`).

Trinity deletes nothing; the launcher does, from the run's service.
"""

from __future__ import annotations

import logging
from pathlib import Path

import httpx

from astuner.backbone.spawned.keeping import steps_in, surplus
from astuner.backbone.trinity.checkpoints import REMOTE, job_folder, newest, remote_path, step_of
from astuner.config.schema import TrainerConfig

log = logging.getLogger(__name__)

SECONDS = 10.0
GONE = 404
"""The service has no such checkpoint, which is what was wished for."""


class Surplus:
    """Of one run, over its service (URL and key); without one it does nothing."""

    def __init__(
        self, run_dir: Path, trainer: TrainerConfig, last: int, service: tuple[str, str] | None
    ) -> None:
        """`last` is the last step of the run, whose checkpoint is a lasting one."""
        self._run_dir = run_dir
        self._trainer = trainer
        self._last = last
        self._service = service
        self._seen = 0

    def delete(self, step: int) -> None:
        """What has become too many now that this step is done. Never raises: a checkpoint that
        cannot be deleted costs room, not the run."""
        checkpoint = newest(self._run_dir) if step > self._seen and self._service else None
        self._seen = max(step, self._seen)
        if checkpoint is None:
            return
        folder = job_folder(self._run_dir)
        saved = [s for s in steps_in(folder) if (folder / f"global_step_{s}" / REMOTE).exists()]
        for old in surplus(
            saved,
            step_of(checkpoint),
            every=self._trainer.save_freq,
            keep=self._trainer.keep_checkpoints,
            last=self._last,
        ):
            self._delete(folder / f"global_step_{old}")

    def _delete(self, folder: Path) -> None:
        assert self._service is not None
        url, key = self._service
        try:
            run, kind, name = (remote_path(folder) or "").removeprefix("tinker://").split("/")
            where = f"{url}/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
            response = httpx.delete(where, headers={"X-API-Key": key}, timeout=SECONDS)
            if response.status_code != GONE:
                response.raise_for_status()
            (folder / REMOTE).unlink(missing_ok=True)
        except (httpx.HTTPError, OSError, ValueError) as error:
            log.warning("An old checkpoint cannot be deleted: %s", error)
