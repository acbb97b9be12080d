"""Checkpoints: their folders under the data folder, and who may read, change and delete them.

A folder appears under its name only when it is whole, and its record is written after
that; an expired or deleted one is gone from sight at once and from the disk soon after.
Foreign checkpoints do not exist (404), published ones may be read by every tenant.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from astuner.errors import CheckpointError, RequestError
from astuner.service.names import CheckpointPath
from astuner.service.records import CheckpointRecord, RunRecord, key_of, parse, row
from astuner.service.store.protocol import Row, Store

logger = logging.getLogger(__name__)

TEN_YEARS = 10 * 366 * 86400
Export = Callable[[Path], Awaitable[None]]
"""Writes weights into the (new, empty) folder it is given."""


class CheckpointBook:
    """All checkpoints of the server."""

    def __init__(self, store: Store, root: Path, *, max_bytes: int = 0) -> None:
        """`max_bytes` bounds what one tenant may keep; 0 means no limit."""
        self._store = store
        self.root = root
        self._max_bytes = max_bytes
        self._records: dict[str, CheckpointRecord] = {}
        self._writing: set[str] = set()

    def load(self) -> None:
        """Read what an earlier server left. A record without its folder is dropped."""
        shutil.rmtree(self.root / ".tmp", ignore_errors=True)
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
        return record.path.folder(self.root)

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
        key = str(path)
        self._check_free(key, run.tenant, overwrite)
        self._writing.add(key)
        fresh = self.root / ".tmp" / uuid.uuid4().hex
        try:
            await export(fresh)
            record = CheckpointRecord(
                path.run_id,
                path.kind,
                path.name,
                run.tenant,
                run.base_model,
                run.shape,
                time.time(),
                await asyncio.to_thread(_size, fresh),
                expires_at,
                user_metadata=user_metadata,
            )
            await asyncio.to_thread(self._put_in_place, fresh, record)
            self._store.write([row(record)])
            self._records[key] = record
            return record
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint {path.name!r} cannot be written: {error.strerror or error}. "
                "Is the server's disk full?"
            ) from error
        finally:
            self._writing.discard(key)
            await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)

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
        used = sum(r.size_bytes for r in self.of_tenant(tenant))
        if self._max_bytes and used >= self._max_bytes:
            raise RequestError(
                f"Your checkpoints use {used} bytes of the {self._max_bytes} that this server "
                "allows each tenant. Delete some, or give them a ttl.",
                code="quota_exceeded",
            )

    def _put_in_place(self, fresh: Path, record: CheckpointRecord) -> None:
        folder = self.folder(record)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            aside = self.root / ".tmp" / uuid.uuid4().hex
            folder.rename(aside)
            fresh.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            fresh.rename(folder)

    # ------------------------------------------------------------ changing

    def publish(self, path: CheckpointPath, tenant: str, public: bool) -> None:
        """Let every tenant read it, or no longer."""
        self._replace(replace(self.find(path, tenant, reading=False), public=public))

    def set_ttl(self, path: CheckpointPath, tenant: str, ttl_seconds: int | None) -> None:
        """Expire that many seconds from now, or never."""
        record = self.find(path, tenant, reading=False)
        self._replace(replace(record, expires_at=_expiry(ttl_seconds)))

    async def delete(self, path: CheckpointPath, tenant: str) -> None:
        """Its files go too. Samplers that have read it already keep their weights."""
        await self._remove([self.find(path, tenant, reading=False)])

    async def purge(self) -> int:
        """Remove what has expired; returns how many."""
        now = time.time()
        old = [r for r in self._records.values() if _expired(r, now)]
        await self._remove(old)
        return len(old)

    async def _remove(self, records: Sequence[CheckpointRecord]) -> None:
        if not records:
            return
        self._forget(records)
        for record in records:
            await asyncio.to_thread(shutil.rmtree, self.folder(record), ignore_errors=True)

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


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
