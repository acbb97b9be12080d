"""Where the trainer gets its groups from: in step with it, or ahead of it.

`SyncSource` runs exactly the step's tasks when they are asked for. `AsyncSource` keeps
rollouts going while the trainer works, as far ahead as `staleness` allows, and drops
groups that became too stale. Both go through the tasks in an order that is a pure
function of the step, counted as the trainer counts. Neither knows what training is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from astuner.task_rollout.naming import Place
from astuner.task_rollout.rollout import Rollout, all_or_none, sampled_tokens
from astuner.task_rollout.staleness import may_be_pending, too_stale
from astuner.types import Group, Task

TasksFor = Callable[[int], Sequence[Task]]
"""The tasks of a step: a pure function, for any step from the first one on."""
SPARE_STEP = 1_000_000
"""The tasks that refill a step are those of a step far beyond the end of any run: other
ones than the step's own, and the same after a resume."""


class GroupSource(Protocol):
    """What a trainer may ask for."""

    async def next_groups(self, step: int) -> list[Group]: ...
    async def refill(self, step: int, round: int, num_groups: int) -> list[Group]: ...
    async def on_publish(self, version: int) -> None: ...
    def counters(self) -> Mapping[str, float]: ...
    def state(self) -> Mapping[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    async def aclose(self) -> None: ...


def make_source(
    rollout: Rollout,
    tasks_for: TasksFor,
    *,
    batch_size: int,
    max_staleness: int,
    total_steps: int | None = None,
) -> GroupSource:
    """Synchronous for `max_staleness` 0, else asynchronous."""
    if max_staleness <= 0:
        return SyncSource(rollout, tasks_for)
    return AsyncSource(
        rollout,
        tasks_for,
        batch_size=batch_size,
        max_staleness=max_staleness,
        total_steps=total_steps,
    )


class SyncSource:
    """Rollout and training take turns: every token is of the newest weights."""

    def __init__(self, rollout: Rollout, tasks_for: TasksFor) -> None:
        self._rollout = rollout
        self._tasks_for = tasks_for

    async def next_groups(self, step: int) -> list[Group]:
        """The groups of the step's tasks, in their order, failed episodes included.

        Raises UserCodeError or EngineError when nothing in the run works.
        """
        places = ((Place(step, i), task) for i, task in enumerate(self._tasks_for(step)))
        return await all_or_none(self._rollout.group(task, place) for place, task in places)

    async def refill(self, step: int, round: int, num_groups: int) -> list[Group]:
        """`num_groups` more for the step, of other tasks; rounds count from 1."""
        spare = self._spare(step, round)
        return await all_or_none(
            self._rollout.group(next(spare), Place(step, 1000 * round + i))
            for i in range(num_groups)
        )

    def _spare(self, step: int, round: int) -> Iterator[Task]:
        first = SPARE_STEP + 10_000 * step + 100 * round
        while True:
            yield from self._tasks_for(first)
            first += 1

    async def on_publish(self, version: int) -> None:
        """Nothing is under way between steps."""

    def counters(self) -> dict[str, float]:
        """What the rollout counted since the last call."""
        return self._rollout.take_counters()

    def state(self) -> dict[str, Any]:
        """Empty: the step says everything."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""

    async def aclose(self) -> None:
        """Nothing is under way between calls."""


class AsyncSource:
    """Rollouts go on while the trainer works; see `staleness` for how far ahead.

    Groups come in the order in which they end, those that started first before others;
    a batch is returned in the order of the tasks.
    """

    def __init__(
        self,
        rollout: Rollout,
        tasks_for: TasksFor,
        *,
        batch_size: int,
        max_staleness: int,
        total_steps: int | None = None,
    ) -> None:
        """`total_steps` keeps it from starting groups that nobody will train on."""
        self._rollout = rollout
        self._tasks_for = tasks_for
        self._batch_size = batch_size
        self._max_staleness = max_staleness
        self._total_steps = total_steps
        self._version = rollout.version()
        self._step = 0
        self._wanted = 0
        self._training = False
        self._cursor: Place | None = None
        self._again: list[Place] = []
        self._running: dict[Place, asyncio.Task[Group]] = {}
        self._ready: dict[Place, Group] = {}
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._counters: Counter[str] = Counter()

    @property
    def pending(self) -> int:
        """Groups in flight or queued."""
        return len(self._running) + len(self._ready)

    async def next_groups(self, step: int) -> list[Group]:
        """A batch of groups that are fresh enough for the weights about to be trained.

        Raises UserCodeError or EngineError when nothing in the run works.
        """
        self._step = step
        if self._cursor is None:
            self._cursor = Place(step, 0)
        return await self._take(self._batch_size)

    async def refill(self, step: int, round: int, num_groups: int) -> list[Group]:
        """The next `num_groups` of the stream, for a step that has too few."""
        return await self._take(num_groups)

    async def on_publish(self, version: int) -> None:
        """New weights sample from now on: further groups may start."""
        self._version = version
        self._training = False
        self._start_groups()

    def counters(self) -> dict[str, float]:
        """What happened since the last call, and how many groups are on their way now."""
        counted = {**self._rollout.take_counters(), **self._counters}
        counted["rollout/groups_in_flight"] = len(self._running)
        counted["rollout/groups_queued"] = len(self._ready)
        self._counters.clear()
        return counted

    def state(self) -> dict[str, Any]:
        """How far the order of tasks was taken, and which of them were not handed out."""
        unused = sorted([*self._ready, *self._running, *self._again])
        cursor = self._cursor and [self._cursor.step, self._cursor.index]
        return {"cursor": cursor, "again": [[p.step, p.index, p.attempt] for p in unused]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; what was not handed out then is run again."""
        self._cursor = Place(*state["cursor"]) if state.get("cursor") else None
        self._again = [Place(*place) for place in state.get("again", ())]
        self._version = self._rollout.version()

    async def aclose(self) -> None:
        """Cancel what is in flight, and return when it has ended."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # ---------------------------------------------------------------- inside

    async def _take(self, count: int) -> list[Group]:
        self._training = False
        self._wanted = count
        try:
            while True:
                self._drop_stale()
                if len(self._ready) >= count:
                    break
                if self._error is not None:
                    raise self._error
                self._start_groups()
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._wanted = 0
        chosen = sorted(self._ready)[:count]
        groups = [self._ready.pop(place) for place in chosen]
        self._training = True
        self._start_groups()
        return groups

    def _drop_stale(self) -> None:
        for place, group in list(self._ready.items()):
            if too_stale(group.oldest_version, self._version, self._max_staleness):
                del self._ready[place]
                self._again.append(Place(place.step, place.index, place.attempt + 1))
                self._counters["rollout/groups_too_stale"] += 1
                self._counters["tokens_masked/too_stale"] += sampled_tokens(group.episodes)

    def _start_groups(self) -> None:
        """Start as many groups as the gate admits and the run still needs."""
        limit = may_be_pending(
            self._batch_size, self._max_staleness, training=self._training, wanted=self._wanted
        )
        if self._total_steps is not None:
            later = max(0, self._total_steps - self._step) * self._batch_size
            limit = min(limit, later + self._wanted)
        while self.pending < limit and self._error is None:
            place = self._next_place()
            task = asyncio.create_task(
                self._rollout.group(self._tasks_for(place.step)[place.index], place)
            )
            self._running[place] = task
            task.add_done_callback(partial(self._on_end, place))

    def _next_place(self) -> Place:
        if self._again:
            self._again.sort()
            return self._again.pop(0)
        place = self._cursor
        assert place is not None, "next_groups comes first"
        last = place.index + 1 >= len(self._tasks_for(place.step))
        self._cursor = Place(place.step + 1, 0) if last else Place(place.step, place.index + 1)
        return place

    def _on_end(self, place: Place, task: asyncio.Task[Group]) -> None:
        del self._running[place]
        if task.cancelled():
            return  # by aclose
        if error := task.exception():
            self._error = error  # raised where the trainer waits
        else:
            self._ready[place] = task.result()
        self._changed.set()
