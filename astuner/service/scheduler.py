"""Who is next: a fair queue of work, and a bounded number of workers that empty it.

Work is queued by tenant and, below it, by lane (a run or a sampler). Tenants take turns,
and a tenant's lanes take turns, so neither many runs nor many requests buy a larger share.
Within a lane work is done in the order it came. What the work is, is not known here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

Job = Callable[[], Awaitable[None]]
"""Must not raise: whoever queues it has somebody to tell."""


@dataclass(frozen=True, slots=True)
class Work:
    tenant: str
    lane: str
    run: Job
    drop: Callable[[], None]
    """Called instead of `run` when the lane is closed."""


class FairQueue:
    """First in, first out within a lane; round-robin over tenants, and over their lanes."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[str, deque[Work]]] = OrderedDict()
        self._lengths: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._lengths.values())

    def length(self, tenant: str) -> int:
        """How much of this tenant's work waits."""
        return self._lengths.get(tenant, 0)

    def lengths(self) -> dict[str, int]:
        """How much waits, for each tenant that has something waiting."""
        return dict(self._lengths)

    def push(self, work: Work) -> None:
        lanes = self._tenants.setdefault(work.tenant, OrderedDict())
        lanes.setdefault(work.lane, deque()).append(work)
        self._count(work.tenant, 1)

    def pop(self) -> Work | None:
        """The next piece of work; its tenant and lane go to the end of their rows."""
        if not self._tenants:
            return None
        tenant, lanes = self._tenants.popitem(last=False)
        lane, queue = lanes.popitem(last=False)
        work = queue.popleft()
        if queue:
            lanes[lane] = queue
        if lanes:
            self._tenants[tenant] = lanes
        self._count(tenant, -1)
        return work

    def close_lane(self, tenant: str, lane: str) -> list[Work]:
        """Take out all work of a lane."""
        lanes = self._tenants.get(tenant, OrderedDict())
        dropped = list(lanes.pop(lane, ()))
        if tenant in self._tenants and not lanes:
            del self._tenants[tenant]
        self._count(tenant, -len(dropped))
        return dropped

    def _count(self, tenant: str, more: int) -> None:
        self._lengths[tenant] = self._lengths.get(tenant, 0) + more
        if not self._lengths[tenant]:
            del self._lengths[tenant]


class Workers:
    """Does at most `slots` pieces of work at a time, on the loop that submits them."""

    def __init__(self, slots: int) -> None:
        self.queue = FairQueue()
        self.slots = slots
        self._tasks: dict[asyncio.Task[None], Work] = {}

    @property
    def busy(self) -> int:
        return len(self._tasks)

    def submit(self, work: Work) -> None:
        self.queue.push(work)
        self._fill()

    @asynccontextmanager
    async def turn(self, tenant: str, lane: str) -> AsyncGenerator[None]:
        """Wait for a slot, and hold it inside."""
        granted, over = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            granted.set()
            await over.wait()

        self.submit(Work(tenant, lane, hold, granted.set))
        try:
            await granted.wait()
            yield
        finally:
            over.set()

    def close_lane(self, tenant: str, lane: str) -> None:
        """Drop what waits in the lane, and cancel what is being done of it."""
        for work in self.queue.close_lane(tenant, lane):
            work.drop()
        for task, work in list(self._tasks.items()):
            if (work.tenant, work.lane) == (tenant, lane):
                task.cancel()

    async def close(self) -> None:
        """Drop and cancel everything."""
        while (work := self.queue.pop()) is not None:
            work.drop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fill(self) -> None:
        while len(self._tasks) < self.slots and (work := self.queue.pop()) is not None:
            task = asyncio.ensure_future(work.run())
            self._tasks[task] = work
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[None]) -> None:
        work = self._tasks.pop(task)  # pyright: ignore[reportArgumentType]
        if task.cancelled():
            work.drop()
        elif (error := task.exception()) is not None:
            work.drop()
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"work of {work.lane} raised", "exception": error}
            )
        self._fill()
