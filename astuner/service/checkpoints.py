"""Checkpoints: their folders under the data folder, and who may read, change and delete them.

Every save has a folder of its own, NAME@SAVE, which is never written again. What a name
stands for is its record, so saving under it again is the writing of one row: before it the
old weights are there, after it the new ones. Folders without a record go: the replaced ones
at once (unless a sampler still needs them), what a killed server left at the next start.
Foreign checkpoints do not exist (404), published ones may be read by every tenant.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from astuner.errors import CheckpointError, RequestError
from astuner.service.cancelling import undone_if_cancelled
from astuner.service.names import CheckpointPath, new_save_id
from astuner.service.records import CheckpointRecord, RunRecord, key_of, parse, row
from astuner.service.snapshots import SnapshotShelf
from astuner.service.store.protocol import Row, Store

logger = logging.getLogger(__name__)

TEN_YEARS = 10 * 366 * 86400
Export = Callable[[Path], Awaitable[None]]
"""Writes weights into the (new, empty) folder it is given."""


class CheckpointBook:
    """All checkpoints of the server."""

    def __init__(
        self, store: Store, root: Path, shelf: SnapshotShelf, *, max_bytes: int = 0
    ) -> None:
        """`max_bytes` bounds what one tenant may keep on disk; 0 means no limit."""
        self._store = store
        self._shelf = shelf
        self.root = root
        self._max_bytes = max_bytes
        self._records: dict[str, CheckpointRecord] = {}
        self._writing: set[str] = set()
        self._in_doubt: list[CheckpointRecord] = []
        """Saves that the store did not take, or so it said."""

    def load(self) -> None:
        """Read what an earlier server left. A record without its folder is dropped, and a
        folder without its record."""
        gone: list[CheckpointRecord] = []
        for _, value in self._store.scan("checkpoints"):
            record = parse(CheckpointRecord, value)
            if self.folder(record).is_dir():
                self._records[key_of(record)] = record
            else:
                logger.warning("The checkpoint %s has lost its folder.", record.path)
                gone.append(record)
        if gone:
            self._forget(gone)
        self._sweep()

    def _sweep(self) -> None:
        """Remove the folders of saves that were not finished, or were replaced. Where there are
        no records at all, those may be what was lost: nothing is removed then."""
        known = {self.folder(record) for record in self._records.values()}
        orphans = [f for f in self.root.glob("*/*/*") if f.is_dir() and f not in known]
        if orphans and not known and not any(self._store.scan("sessions")):
            logger.warning(
                "There are %d folders of checkpoints in %s and no records at all; they are "
                "left there, and can be removed by hand.",
                len(orphans),
                self.root,
            )
            return
        for folder in orphans:
            shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------ finding

    def find(self, path: CheckpointPath, tenant: str, *, reading: bool) -> CheckpointRecord:
        """Raises RequestError (404) unless it is the tenant's own, or only to be read and
        published."""
        record = self._records.get(str(path))
        allowed = record is not None and (record.tenant == tenant or (reading and record.public))
        if record is None or not allowed or _expired(record, time.time()):
            raise RequestError(
                f"There is no checkpoint {path} (it may have expired, or been deleted).",
                status=404,
                code="no_such_checkpoint",
            )
        return record

    def folder(self, record: CheckpointRecord) -> Path:
        return record.path.folder(self.root, record.save)

    def of_tenant(self, tenant: str) -> list[CheckpointRecord]:
        """Newest first."""
        now = time.time()
        mine = [r for r in self._records.values() if r.tenant == tenant and not _expired(r, now)]
        return sorted(mine, key=lambda r: r.created_at, reverse=True)

    def of_run(self, run_id: str) -> list[CheckpointRecord]:
        """Oldest first."""
        now = time.time()
        found = [r for r in self._records.values() if r.run_id == run_id and not _expired(r, now)]
        return sorted(found, key=lambda r: r.created_at)

    # ------------------------------------------------------------ writing

    async def save(
        self,
        path: CheckpointPath,
        run: RunRecord,
        export: Export,
        *,
        ttl_seconds: int | None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> CheckpointRecord:
        """Raises RequestError (400) for a name that is taken or a quota that is used up,
        CheckpointError when the disk does not take it; then nothing has changed."""
        expires_at = _expiry(ttl_seconds)
        key, save = str(path), new_save_id()
        self._check_free(key, run.tenant, overwrite)
        self._writing.add(key)
        folder = path.folder(self.root, save)
        try:
            await undone_if_cancelled(_exported(export, folder), lambda _: _remove(folder))
            record = CheckpointRecord(
                path.run_id,
                path.kind,
                path.name,
                save,
                run.tenant,
                run.base_model,
                run.shape,
                time.time(),
                await asyncio.to_thread(_size, folder),
                expires_at,
                user_metadata=user_metadata,
            )
        except BaseException as error:
            await _remove(folder)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"The checkpoint {path.name!r} cannot be written: {error.strerror or error}. "
                    "Is the server's disk full?"
                ) from error
            raise
        finally:
            self._writing.discard(key)
        await self._swap(record)
        return record

    async def _swap(self, record: CheckpointRecord) -> None:
        """From now on the name stands for this save. Should the store fail, it may all the same
        have taken the row (Redis, say, when its answer was lost), so the new folder stays until
        `purge` has put the row right."""
        key = key_of(record)
        old = self._records.get(key)
        try:
            self._replace(record)
        except CheckpointError:
            self._in_doubt.append(record)
            raise
        if old is not None:
            await self._give_up(old)

    def _check_free(self, key: str, tenant: str, overwrite: bool) -> None:
        known = self._records.get(key)
        taken = known is not None and not _expired(known, time.time())
        if key in self._writing or (taken and not overwrite):
            raise RequestError(
                f"There is a checkpoint {key} already. Save under another name, delete it first, "
                "or (for training states) pass overwrite=True.",
                code="checkpoint_exists",
                param="path",
            )
        self.check_quota(tenant)

    def check_quota(self, tenant: str) -> None:
        """Raises RequestError (400) when the tenant has no room on disk left: for checkpoints,
        and for the weights of samplers that wait there."""
        used = sum(r.size_bytes for r in self._records.values() if r.tenant == tenant)
        spilled = self._shelf.spilled_bytes(tenant)
        if self._max_bytes and used + spilled >= self._max_bytes:
            raise RequestError(
                f"Your checkpoints use {used} bytes, and weights kept for samplers only {spilled}, "
                f"of the {self._max_bytes} that this server allows each tenant. Delete some, give "
                "them a ttl, or end sessions whose samplers you no longer need.",
                code="quota_exceeded",
            )

    # ------------------------------------------------------------ changing

    def publish(self, path: CheckpointPath, tenant: str, public: bool) -> None:
        """Let every tenant read it, or no longer."""
        self._replace(replace(self.find(path, tenant, reading=False), public=public))

    def set_ttl(self, path: CheckpointPath, tenant: str, ttl_seconds: int | None) -> None:
        """Expire that many seconds from now, or never."""
        record = self.find(path, tenant, reading=False)
        self._replace(replace(record, expires_at=_expiry(ttl_seconds)))

    async def delete(self, path: CheckpointPath, tenant: str) -> None:
        """Its files go too, with the last sampler of it that there is."""
        await self._remove([self.find(path, tenant, reading=False)])

    async def purge(self) -> int:
        """Remove what has expired, and saves that failed; returns how many had expired."""
        while self._in_doubt:
            key = key_of(self._in_doubt[-1])
            known = self._records.get(key)
            self._store.write([Row("checkpoints", key, None) if known is None else row(known)])
            await _remove(self.folder(self._in_doubt.pop()))
        now = time.time()
        old = [r for r in self._records.values() if _expired(r, now)]
        await self._remove(old)
        return len(old)

    async def _remove(self, records: Sequence[CheckpointRecord]) -> None:
        if not records:
            return
        self._forget(records)
        for record in records:
            await self._give_up(record)

    async def _give_up(self, record: CheckpointRecord) -> None:
        """Remove the files of a record that is gone, unless samplers still need them."""
        if not self._shelf.adopt(record.weights, record.tenant):
            await _remove(self.folder(record))

    def _forget(self, records: Sequence[CheckpointRecord]) -> None:
        self._store.write([Row("checkpoints", key_of(r), None) for r in records])
        for record in records:
            self._records.pop(key_of(record), None)

    def _replace(self, record: CheckpointRecord) -> None:
        self._store.write([row(record)])
        self._records[key_of(record)] = record


def _expired(record: CheckpointRecord, now: float) -> bool:
    return record.expires_at is not None and record.expires_at <= now


def _expiry(ttl_seconds: int | None) -> float | None:
    if ttl_seconds is None:
        return None
    if not 1 <= ttl_seconds <= TEN_YEARS:
        raise RequestError(
            f"ttl_seconds must be from 1 to {TEN_YEARS} (ten years), or None for no limit; it is "
            f"{ttl_seconds}.",
            code="invalid_ttl",
            param="ttl_seconds",
        )
    return time.time() + ttl_seconds


async def _exported(export: Export, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    await export(folder)


async def _remove(folder: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
