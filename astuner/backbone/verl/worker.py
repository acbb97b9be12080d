"""What runs in one AgentLoopWorker process of verl: our proxy, runner and rollout.

verl asks for the sessions of a prompt one by one; the first to come starts the whole group
(or validation task), all of them wait for it, and each gets its own episode's rows. So
groups are judged here as the local trainer does: one from which nothing can be learnt is
dropped. verl replaces a prompt when a session of it raises and none left a row, so the
first session raises `GroupDropped` and its siblings return nothing; a failed episode of a
kept group returns nothing. What is no single group's trouble ends the run through
`files.give_up`. No verl in here: it is met in `agent_loop`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from astuner.algorithm.assign import credit
from astuner.backbone.assembly import Workbench
from astuner.backbone.spawned.bench import hand_over
from astuner.backbone.spawned.files import JobFile, give_up
from astuner.backbone.verl.engine import VerlEngine
from astuner.backbone.verl.learning import AGGREGATIONS
from astuner.backbone.verl.outputs import (
    Row,
    advantage_rows,
    masked_row,
    reward_rows,
    validation_rows,
)
from astuner.backbone.verl.sections import ESTIMATOR
from astuner.errors import AstunerError, ConfigError, UserCodeError
from astuner.task_rollout import Place
from astuner.task_rollout.fail_fast import PATIENCE
from astuner.trainer import TrainSettings
from astuner.trainer.batch import (
    FAILED,
    NO_VARIANCE,
    SINGLE_SURVIVOR,
    why_skipped,
    with_checked_rewards,
)
from astuner.types import Episode, Group


class GroupDropped(AstunerError):
    """Tells verl to replace a group; nobody's mistake."""


@dataclass(frozen=True)
class Asked:
    """One session of one row of `dataset`, as verl asks for it."""

    uid: str
    session: int
    split: str
    index: int
    """Of the task in its split."""
    position: int
    """Of the row in the data."""
    step: int


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    rows: Sequence[list[Row]]
    """Of each session."""
    dropped: str = ""
    """Why verl should replace it."""


@dataclass
class _Shared:
    """A row's outcome, until all of its sessions have it."""

    task: asyncio.Task[Outcome]
    sessions: int


class Worker:
    """Runs groups for verl; all methods belong to one event loop."""

    def __init__(
        self, folder: Path, job: JobFile, bench: Workbench, engine: VerlEngine, verl: Any
    ) -> None:
        """`verl` is verl's whole configuration."""
        config = job.config
        self._folder = folder
        self._job = job
        self._bench = bench
        self._engine = engine
        self._settings = TrainSettings.from_config(config, steps_per_epoch=1)
        self._own_advantages = verl.algorithm.adv_estimator == ESTIMATOR
        mode = verl.actor_rollout_ref.actor.loss_agg_mode  # a raw setting may have replaced ours
        self._aggregation = next((o for o, v in AGGREGATIONS.items() if v == mode), mode)
        workers = verl.actor_rollout_ref.rollout.agent.num_workers
        self._replaceable = self._settings.max_refill_rounds * ceil(
            config.data.train_batch_size / workers
        )
        """Groups without variance that a step may replace here (dynamic sampling)."""
        self._replaced: Counter[int] = Counter()
        self._useless = 0
        """Groups in a row that verl was told to replace, for another reason than variance."""
        self._shared: dict[str, _Shared] = {}

    async def session(self, asked: Asked) -> list[Row]:
        """The rows of one episode.

        Raises GroupDropped, and what ended the run, in the first session only: one report
        is enough for verl and for its log.
        """
        shared = self._shared.get(asked.uid) or self._start(asked)
        shared.sessions -= 1
        if not shared.sessions:
            self._shared.pop(asked.uid, None)
        await asyncio.wait({shared.task})
        error = shared.task.exception()
        if error is not None:
            if asked.session == 0:
                raise error
            return []
        outcome = shared.task.result()
        if outcome.dropped and asked.session == 0:
            raise GroupDropped(outcome.dropped)
        return outcome.rows[asked.session]

    def _start(self, asked: Asked) -> _Shared:
        work = self._validate(asked) if asked.split != "train" else self._train(asked)
        task = asyncio.create_task(work, name=f"group of row {asked.position}")
        task.add_done_callback(self._ended)
        settings = self._bench.rollout.settings
        sessions = settings.num_repeat if asked.split == "train" else settings.val_num_repeat
        self._shared[asked.uid] = shared = _Shared(task, sessions)
        return shared

    def _ended(self, task: asyncio.Task[Outcome]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            give_up(self._folder, error)

    # ---------------------------------------------------------------- training

    async def _train(self, asked: Asked) -> Outcome:
        step, place = divmod(asked.position, self._job.config.data.train_batch_size)
        task = self._job.tasks.train[asked.index]
        # As local counts them: from 1. The row alone decides, so a resume repeats ids and seeds.
        group = await self._bench.rollout.group(task, Place(step + 1, place))
        group = with_checked_rewards(group)
        dropped = self._why_dropped(group, asked.step)
        await self._hand_over(asked, "train", group.episodes, not dropped)
        self._count_useless(group, dropped)
        if dropped:
            return Outcome([[] for _ in group.episodes], _told(group, dropped))
        return Outcome(self._rows(group))

    def _why_dropped(self, group: Group, step: int) -> str | None:
        [reason] = why_skipped([group], self._settings)
        if reason == NO_VARIANCE:
            return NO_VARIANCE if self._may_replace(step) else None
        alone = len(group.usable) == 1 < len(group.episodes)
        if reason is None and alone and not self._own_advantages:
            return SINGLE_SURVIVOR  # verl's GRPO takes the bare reward for its advantage
        return reason

    def _count_useless(self, group: Group, dropped: str | None) -> None:
        """verl would replace groups for ever, and each new episode is a sign of life.

        Raises UserCodeError. Groups whose episodes all failed end a run in `task_rollout`."""
        if dropped == NO_VARIANCE:
            return
        self._useless = self._useless + 1 if dropped else 0
        limit = self._bench.rollout.settings.fail_fast_groups * PATIENCE
        if dropped and self._useless >= limit:
            raise UserCodeError(
                f"{self._useless} groups in a row taught nothing, so the run was stopped: the "
                f"workflow's LLM calls have to go through the tuner, and a group needs two "
                f"episodes that end well. The last: {_told(group, dropped)}"
            )

    def _may_replace(self, step: int) -> bool:
        """With dynamic sampling, as long as the step has replaced few enough."""
        if not self._settings.dynamic_sampling or self._replaced[step] >= self._replaceable:
            return False
        self._replaced[step] += 1
        return True

    def _rows(self, group: Group) -> list[list[Row]]:
        usable = {e.episode_id for e in group.usable}
        if not self._own_advantages:
            _refuse_targets(group)
            return [reward_rows(e) if e.episode_id in usable else [] for e in group.episodes]
        [samples] = credit([group], self._settings.estimator)
        return [
            advantage_rows(
                e, [s for s in samples if s.episode_id == e.episode_id], self._aggregation
            )
            for e in group.episodes
        ]

    # ---------------------------------------------------------------- validation

    async def _validate(self, asked: Asked) -> Outcome:
        """Nothing is dropped: failed episodes are worth 0."""
        version = self._engine.version
        if asked.split != "validation":  # there is no task
            return Outcome(
                [[masked_row(version, {})]] * self._bench.rollout.settings.val_num_repeat
            )
        task = self._job.tasks.validation[asked.index]
        episodes = await self._bench.rollout.validate(task, asked.step, asked.index)
        await self._hand_over(asked, "validation", episodes)
        return Outcome([validation_rows(e, version) for e in episodes])

    async def _hand_over(
        self,
        asked: Asked,
        split: Literal["train", "validation"],
        episodes: Sequence[Episode],
        kept: bool = True,
    ) -> None:
        rollout = self._bench.rollout
        told: dict[str, Any] = {"step": asked.step, "split": split, "name": asked.uid}
        await hand_over(self._folder, rollout, episodes, kept=kept, **told)


def _told(group: Group, reason: str) -> str:
    """For verl's log."""
    failures = [e.failure for e in group.episodes if e.failure is not None]
    said = f"{len(failures)} of {len(group.episodes)} episodes failed"
    if failures:
        said += f", the first: {failures[0].message}"
    elif reason == FAILED:
        said = "no episode made an LLM call"
    return f"Group {group.group_id} is replaced ({reason}): {said}"


def _refuse_targets(group: Group) -> None:
    """verl's own estimators know one number for an episode; the mean over its targets would
    train all of them on it."""
    if any(e.target_rewards is not None for e in group.usable):
        raise ConfigError(
            "`astuner.verl.algorithm.adv_estimator` compares episodes by one reward, but the "
            "workflow or judge gives rewards by target. Leave that key out (astuner's own know "
            "targets), or return one number."
        )
