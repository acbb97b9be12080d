"""Many episodes: the groups of a training step and the tasks of a validation.

Runs episodes side by side up to one global limit, tries again after infrastructure
failures (with a fresh session, never after the workflow's own bug), and stops a run
in which nothing works. Ids and seeds depend only on the place in the run. It does
not decide when a group may start; `sources` does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from astuner.task_rollout.fail_fast import FailFast
from astuner.task_rollout.naming import Place, derive_seed, episode_id, validation_group_id
from astuner.types import Episode, Group, Task, WorkflowTask

if TYPE_CHECKING:
    from astuner.model_tuner import SessionSampling

T = TypeVar("T")


class Runner(Protocol):
    """Runs one episode; `task_runner.EpisodeRunner` does."""

    @property
    def threads_left_behind(self) -> int: ...

    @property
    def counters(self) -> Counter[str]:
        """What happened in its sessions, by name; cleared by who reads it."""
        ...

    async def run(
        self, workflow_task: WorkflowTask, *, group_id: str, seed: int, sampling: SessionSampling
    ) -> Episode: ...


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    sampling: SessionSampling
    val_sampling: SessionSampling
    num_repeat: int = 8
    """Episodes per training task."""
    val_num_repeat: int = 1
    val_max_tasks: int = 0
    """0 validates on all."""
    max_env_worker: int = 128
    """Episodes at once, of training and validation together."""
    max_retries: int = 2
    backoff: float = 1.0
    """Seconds before the first retry; doubles with each."""
    seed: int = 0
    fail_fast_groups: int = 8
    """Stop the run when so many tasks in a row failed with all their episodes (four times
    as many once something has worked)."""


@dataclass(slots=True)
class _Birth:
    """The weight version when a group's first episode really started."""

    version: int | None = None


@dataclass(slots=True)
class Rollout:
    """Runs groups and validations with one runner, on one event loop."""

    runner: Runner
    settings: RolloutSettings
    version: Callable[[], int] = field(default=lambda: 0)
    """The weight version that samples now."""
    on_episode: Callable[[Episode], None] | None = None
    """Called in the event loop for every episode that has ended for good."""
    counters: Counter[str] = field(default_factory=Counter[str])
    """What happened since `take_counters`, under the names it is logged by."""
    _slots: asyncio.Semaphore = field(init=False)
    _fail_fast: FailFast = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.settings.max_env_worker)
        self._fail_fast = FailFast(self.settings.fail_fast_groups)

    async def group(self, task: Task, place: Place) -> Group:
        """Run `num_repeat` episodes of one task.

        Raises UserCodeError or EngineError when nothing in the run works.
        """
        birth = _Birth()
        episodes = await all_or_none(
            self._episode(
                task,
                "train",
                place.group_id,
                repeat,
                seed=derive_seed(self.settings.seed, place.step, place.index, repeat),
                birth=birth,
            )
            for repeat in range(self.settings.num_repeat)
        )
        self._fail_fast.observe(episodes)
        born = self.version() if birth.version is None else birth.version
        return Group(place.group_id, task, tuple(episodes), born)

    async def evaluate(self, tasks: Sequence[Task], step: int = 0) -> list[Episode]:
        """Run every validation task `val_num_repeat` times, in the order of the tasks.

        The seeds do not depend on `step`, so that two validations of a run differ by their
        weights only. Raises like `group`.
        """
        chosen = tasks[: self.settings.val_max_tasks or None]
        repeated = await all_or_none(
            self.validate(task, step, index) for index, task in enumerate(chosen)
        )
        return [episode for episodes in repeated for episode in episodes]

    async def validate(self, task: Task, step: int, index: int) -> list[Episode]:
        """Run one validation task, the `index`th, `val_num_repeat` times. Raises like `group`."""
        group_id = validation_group_id(step, index)
        episodes = await all_or_none(
            self._episode(
                task,
                "validation",
                group_id,
                repeat,
                seed=derive_seed(self.settings.seed, "validation", index, repeat),
                birth=_Birth(),
            )
            for repeat in range(self.settings.val_num_repeat)
        )
        self._fail_fast.observe(episodes)
        return episodes

    async def _episode(
        self,
        task: Task,
        split: Literal["train", "validation"],
        group_id: str,
        repeat: int,
        *,
        seed: int,
        birth: _Birth,
    ) -> Episode:
        """One episode, tried again as long as infrastructure is to blame."""
        attempt = 0
        while True:
            attempt += 1
            async with self._slots:
                if birth.version is None:
                    birth.version = self.version()
                episode = await self.runner.run(
                    _workflow_task(task, split, group_id, repeat),
                    group_id=group_id,
                    seed=seed,
                    sampling=self.settings.sampling
                    if split == "train"
                    else self.settings.val_sampling,
                )
            retriable = episode.failure is not None and episode.failure.retriable
            if not retriable or attempt > self.settings.max_retries:
                break
            self.counters["tokens_masked/retried"] += sampled_tokens([episode])
            await asyncio.sleep(self.settings.backoff * 2 ** (attempt - 1))
        episode = replace(episode, attempts=attempt, task=task)
        if self.on_episode is not None:
            self.on_episode(episode)
        return episode

    def take_counters(self) -> dict[str, float]:
        """What was counted since the last call, that the episodes themselves do not tell."""
        taken = dict[str, float](self.counters)
        self.counters.clear()
        for name, count in (+self.runner.counters).items():
            taken[name if "/" in name else f"proxy/{name}"] = count
        self.runner.counters.clear()
        if left_behind := self.runner.threads_left_behind:
            taken["rollout/threads_left_behind"] = left_behind
        return taken


def sampled_tokens(episodes: Iterable[Episode]) -> int:
    """Tokens that the policy sampled in these episodes."""
    return sum(len(call.completion_ids) for episode in episodes for call in episode.calls)


def _workflow_task(
    task: Task, split: Literal["train", "validation"], group_id: str, repeat: int
) -> WorkflowTask:
    """The task as one episode gets it: a copy, so that what it changes stays its own."""
    return WorkflowTask(
        task=task.model_copy(deep=True),
        task_id=task.task_id,
        episode_id=episode_id(group_id, repeat),
        repeat_index=repeat,
        split=split,
    )


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; when one raises or the caller is cancelled, all are cancelled
    and have ended before this returns."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
