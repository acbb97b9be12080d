"""Deletes those of Trinity's checkpoints that are not to stay, from the run's service.

Of training states `spawned.keeping` says which stay; of the weights that only sample, the
newest few. Trinity deletes no states, and does not manage to delete the weights: it names
them without their kind (trainer/tinker/tinker_trainer.py:393).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx

from astuner.backbone.spawned.keeping import steps_in, surplus
from astuner.backbone.trinity.checkpoints import (
    REMOTE,
    REMOTE_SAMPLER,
    job_folder,
    newest,
    step_of,
)
from astuner.config.schema import TrainerConfig

log = logging.getLogger(__name__)

SECONDS = 10.0
SAMPLERS = 8
"""So many stay: an explorer that lags may still sample with them."""
GONE = 404
"""The service has no such checkpoint, which is what was wished for."""


class Surplus:
    """Of one run, over its service (URL and key); without one it does nothing. Of one loop."""

    def __init__(
        self, run_dir: Path, trainer: TrainerConfig, last: int, service: tuple[str, str] | None
    ) -> None:
        """`last` is the last step of the run, whose checkpoint is a lasting one."""
        self._run_dir = run_dir
        self._trainer = trainer
        self._last = last
        self._service = service
        self._seen = 0
        self._task: asyncio.Task[None] | None = None

    def delete(self, step: int) -> None:
        """Begin with what has become too many now that this step is done. Never raises: a
        checkpoint that cannot be deleted costs room, not the run."""
        busy = self._task is not None and not self._task.done()
        if self._service is None or step <= self._seen or busy:
            return
        self._seen = step
        self._task = asyncio.create_task(self._delete(*self._service), name="surplus checkpoints")

    async def settle(self) -> None:
        """Wait until what was begun is done."""
        if self._task is not None:
            await self._task

    async def _delete(self, url: str, key: str) -> None:
        async with httpx.AsyncClient(headers={"X-API-Key": key}, timeout=SECONDS) as client:
            for file in [*self._states(), *self._samplers()]:
                await _delete(client, url, file)

    def _states(self) -> Iterator[Path]:
        if (checkpoint := newest(self._run_dir)) is None:
            return
        for old in surplus(
            self._with(REMOTE),
            step_of(checkpoint),
            every=self._trainer.save_freq,
            keep=self._trainer.keep_checkpoints,
            last=self._last,
        ):
            yield self._file(old, REMOTE)

    def _samplers(self) -> Iterator[Path]:
        upto = [step for step in self._with(REMOTE_SAMPLER) if step <= self._seen]
        for old in upto[:-SAMPLERS]:  # later ones are of a run that was wound back
            yield self._file(old, REMOTE_SAMPLER)

    def _with(self, name: str) -> list[int]:
        folder = job_folder(self._run_dir)
        steps = steps_in(folder) if folder.is_dir() else []
        return [step for step in steps if self._file(step, name).is_file()]

    def _file(self, step: int, name: str) -> Path:
        return job_folder(self._run_dir) / f"global_step_{step}" / name


async def _delete(client: httpx.AsyncClient, url: str, file: Path) -> None:
    """The checkpoint whose path on the service is in the file, and the file."""
    try:
        path = file.read_text().strip()
        run, kind, name = path.removeprefix("tinker://").split("/")
        where = f"{url}/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
        response = await client.delete(where)
        if response.status_code != GONE:
            response.raise_for_status()
        file.unlink(missing_ok=True)
    except (httpx.HTTPError, OSError, ValueError) as error:
        log.warning("An old checkpoint cannot be deleted: %s", error)
