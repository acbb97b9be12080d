"""Weights that sample: which snapshots the engine holds, for whom, and where the rest is.

Each key stands for one set of weights that never changes (except "inflight" ones, which
are replaced). It is held by samplers and forgotten with the last of them. The least
recently used ones beyond a limit leave the engine: to their checkpoint if they have one,
else to a spill folder, from which they come back when somebody samples. A checkpoint that
is deleted or saved again leaves its folder to the samplers that there are of it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from astuner.engine.protocol import AdapterHost
from astuner.errors import AstunerError, EngineError, RequestError
from astuner.service.cancelling import apart
from astuner.service.names import SCHEME

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Entry:
    key: str
    folder: Path | None
    """Where they can be read from, if they have been written."""
    tenant: str = ""
    """Whose they are, if no checkpoint has them."""
    spilled: int = 0
    """Bytes in the folder, if it is ours to remove."""
    snapshot: str = ""
    """The engine's id; empty when it does not hold them."""
    users: int = 0
    holders: set[str] = field(default_factory=set[str])
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SnapshotShelf:
    """All sampling weights of the server. Lives on the server's loop."""

    def __init__(self, host: AdapterHost, spill: Path, *, max_resident: int) -> None:
        self._host = host
        self._spill = spill
        self._max = max_resident
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Least recently used first."""
        shutil.rmtree(spill, ignore_errors=True)

    @property
    def resident(self) -> int:
        return sum(bool(e.snapshot) for e in self._entries.values())

    def hold(self, key: str, holder: str, folder: Path) -> None:
        """Weights that can be read from `folder` are to be kept for `holder`."""
        entry = self._entries.setdefault(key, _Entry(key, folder))
        entry.holders.add(holder)

    def adopt(self, key: str, tenant: str) -> bool:
        """Whether the folder of these weights, whose checkpoint is gone, is still needed. It is
        then removed with the last holder, and counts as the tenant's until then."""
        entry = self._entries.get(key)
        if entry is None or entry.folder is None:
            return False
        entry.tenant, entry.spilled = tenant, _size(entry.folder)
        return True

    def is_kept_for_samplers(self, key: str) -> bool:
        """Whether no checkpoint has them."""
        entry = self._entries.get(key)
        return entry is not None and bool(entry.tenant)

    def spilled_bytes(self, tenant: str) -> int:
        """On disk, of weights that no checkpoint has."""
        return sum(e.spilled for e in self._entries.values() if e.tenant == tenant)

    async def put(self, key: str, holder: str, snapshot: str, tenant: str) -> None:
        """Weights that only the engine has; those that the key stood for before are gone
        for whoever samples next."""
        old = self._entries.pop(key, None)
        entry = _Entry(key, None, tenant, snapshot=snapshot, holders={holder})
        if old is not None:
            entry.holders |= old.holders
            old.holders.clear()
        self._entries[key] = entry
        if old is not None and not old.users:
            await self._discard(old)
        await apart(self._make_room())

    async def let_go(self, key: str, holder: str) -> None:
        """`holder` needs them no more."""
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.holders.discard(holder)
        if not entry.holders and not entry.users:
            await self._discard(entry)

    @asynccontextmanager
    async def use(self, key: str) -> AsyncGenerator[str]:
        """The engine's id of these weights, which stays valid inside; "" is the base model.
        Raises RequestError (400) for weights that are lost."""
        if not key:
            yield ""
            return
        entry = self._entries.get(key)
        if entry is None:
            raise _lost(key)
        entry.users += 1
        try:
            self._entries.move_to_end(entry.key)
            if not entry.snapshot:
                await apart(self._load(entry))
            yield entry.snapshot
        finally:
            entry.users -= 1
            if not entry.holders and not entry.users:
                await self._discard(entry)

    async def _load(self, entry: _Entry) -> None:
        async with entry.lock:
            if not entry.snapshot:
                assert entry.folder is not None  # only what is written leaves the engine
                entry.snapshot = await self._host.open_snapshot(entry.folder)
        await self._make_room()

    async def _make_room(self) -> None:
        idle = [e for e in self._entries.values() if e.snapshot and not e.users]
        for entry in idle[: max(0, self.resident - self._max)]:
            try:
                await self._put_aside(entry)
            except AstunerError as error:  # more in memory for now: no reason to fail anybody
                logger.error("Weights that nobody uses cannot be put aside. %s", error)
                return

    async def _put_aside(self, entry: _Entry) -> None:
        async with entry.lock:
            if entry.users or not entry.snapshot:
                return
            if entry.folder is None:
                folder = self._spill / uuid.uuid4().hex
                await self._host.export(entry.snapshot, folder, optimizer=False)
                entry.folder, entry.spilled = folder, await asyncio.to_thread(_size, folder)
            if not entry.users:
                await self._release(entry)

    async def _discard(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        await apart(self._remove(entry))

    async def _remove(self, entry: _Entry) -> None:
        async with entry.lock:
            await self._release(entry)
        if entry.spilled and entry.folder is not None:
            folder, entry.folder, entry.spilled = entry.folder, None, 0
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _release(self, entry: _Entry) -> None:
        snapshot, entry.snapshot = entry.snapshot, ""
        if snapshot:
            try:
                await self._host.release(snapshot)
            except EngineError:
                return  # the engine was closed before us


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _lost(key: str) -> RequestError:
    if key.startswith(SCHEME):
        why = (
            f"The checkpoint {key.partition('@')[0]} was deleted, or saved again, after this "
            "sampler was made, and the weights it had then are gone with the server that ran then. "
            "Make another sampler."
        )
    else:
        why = (
            "The weights of this sampler were kept in memory only, and are gone with the "
            "server that had them. Save them again: save_weights_and_get_sampling_client(), "
            "or save_weights_for_sampler(name) for weights that stay."
        )
    return RequestError(why, code="weights_lost")
