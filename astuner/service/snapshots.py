"""Weights that sample: which snapshots the engine holds, for whom, and where the rest is.

Each key stands for one set of weights that never changes (except "inflight" ones, which
are replaced). It is held by samplers and forgotten with the last of them. The least
recently used ones beyond a limit leave the engine: to their checkpoint if they have one,
else to a spill folder, from which they come back when somebody samples.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from astuner.engine.protocol import AdapterHost
from astuner.errors import EngineError, RequestError


@dataclass(eq=False, slots=True)
class _Entry:
    key: str
    folder: Path | None
    """Where they can be read from, if they have been written."""
    spilled: bool = False
    """Whether the folder is ours to remove."""
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

    async def put(self, key: str, holder: str, snapshot: str) -> None:
        """Weights that only the engine has; those that the key stood for before are gone
        for whoever samples next."""
        old = self._entries.pop(key, None)
        entry = _Entry(key, None, snapshot=snapshot, holders={holder})
        if old is not None:
            entry.holders |= old.holders
            old.holders.clear()
        self._entries[key] = entry
        if old is not None and not old.users:
            await self._discard(old)
        await self._make_room()

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
            raise RequestError(
                "The weights of this sampler were kept in memory only, and are gone with the "
                "server that had them. Save them again: save_weights_and_get_sampling_client(), "
                "or save_weights_for_sampler(name) for weights that stay.",
                code="weights_lost",
            )
        entry.users += 1
        try:
            await self._load(entry)
            yield entry.snapshot
        finally:
            entry.users -= 1
            if not entry.holders and not entry.users:
                await self._discard(entry)

    async def _load(self, entry: _Entry) -> None:
        if entry.key in self._entries:
            self._entries.move_to_end(entry.key)
        if entry.snapshot:
            return
        async with entry.lock:
            if not entry.snapshot:
                assert entry.folder is not None  # only what is written leaves the engine
                entry.snapshot = await self._host.open_snapshot(entry.folder)
        await self._make_room()

    async def _make_room(self) -> None:
        idle = [e for e in self._entries.values() if e.snapshot and not e.users]
        for entry in idle[: max(0, self.resident - self._max)]:
            async with entry.lock:
                if entry.users or not entry.snapshot:
                    continue
                if entry.folder is None:
                    folder = self._spill / uuid.uuid4().hex
                    await self._host.export(entry.snapshot, folder, optimizer=False)
                    entry.folder, entry.spilled = folder, True
                if not entry.users:
                    await self._release(entry)

    async def _discard(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        async with entry.lock:
            await self._release(entry)
        if entry.spilled and entry.folder is not None:
            await asyncio.to_thread(shutil.rmtree, entry.folder, ignore_errors=True)

    async def _release(self, entry: _Entry) -> None:
        snapshot, entry.snapshot = entry.snapshot, ""
        if snapshot:
            try:
                await self._host.release(snapshot)
            except EngineError:
                return  # the engine was closed before us
