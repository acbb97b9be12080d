"""One group of episodes, or one validation task, for Trinity: rolled out, judged, handed on.

The rows go back to Trinity, the episodes to the launcher. No Trinity in here: it is met in
`workflow`.
"""

from __future__ import annotations

from astuner.backbone.spawned.bench import hand_over
from astuner.backbone.spawned.files import STOP
from astuner.backbone.trinity.experience import Row, group_rows, no_rows, validation_rows
from astuner.backbone.trinity.opening import Desk
from astuner.task_rollout import Place
from astuner.trainer.batch import NO_VARIANCE, why_skipped, with_checked_rewards


async def train_rows(desk: Desk, index: int, step: int, place: int) -> list[Row]:
    """Of a training task, by its index; `step` and `place` are the explorer's, from 1 and 0.

    A group from which nothing can be learnt gives a masked row. One without variance is
    kept: its episodes count in the batch, as zeros. Once the run is over nothing is played,
    though Trinity's explorer goes on until it is ended. Raises UserCodeError or EngineError
    when nothing in the run works, or the trainer makes no weights.
    """
    if not await _may_play(desk, step):
        return no_rows(Place(step, place).group_id)
    task = desk.job.tasks.train[index]
    rollout = desk.bench.rollout
    group = with_checked_rewards(await rollout.group(task, Place(step, place)))
    [reason] = why_skipped([group], desk.settings)
    kept = reason in (None, NO_VARIANCE)
    await hand_over(desk.folder, rollout, group.episodes, step=step, split="train", kept=kept)
    return group_rows(group, desk.settings.estimator, kept=kept)


async def validation_task_rows(desk: Desk, index: int, step: int) -> list[Row]:
    """Of a validation task; `step` is the explorer's. Failed episodes are worth 0."""
    if not await _may_play(desk, step):
        return no_rows("")
    task = desk.job.tasks.validation[index]
    rollout = desk.bench.rollout
    episodes = await rollout.validate(task, step, index)
    await hand_over(desk.folder, rollout, episodes, step=step, split="validation")
    return validation_rows(episodes)


async def _may_play(desk: Desk, step: int) -> bool:
    """False once the run is over; before that, when the weights of this step are there."""
    over = (desk.folder / STOP).exists
    if desk.turns is not None:
        await desk.turns.turn(step, over)
    return not over()
