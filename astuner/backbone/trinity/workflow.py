"""Trinity's workflow (`default_workflow_type`): one group of episodes of astuner's.

Trinity makes an instance for each task of a batch and runs all repeats through it
(`can_repeat`), so a whole group is seen where its advantages are credited. A row of the
task file names the task by its index; all else is in the job file of the process's folder.
Trinity counts a workflow that raises and goes on without its experiences, which its trainer
would wait for; so what ends the run is told to the launcher first.
"""

from __future__ import annotations

from typing import Any

import torch
from trinity.common.experience import EID, Experience  # pyright: ignore[reportMissingImports]
from trinity.common.workflows import Workflow  # pyright: ignore[reportMissingImports]

from astuner.backbone.spawned import stacks as _  # noqa: F401 (this process answers for its stacks)
from astuner.backbone.spawned.files import folder_of_process, give_up
from astuner.backbone.trinity.experience import KEY, Row
from astuner.backbone.trinity.groups import train_rows, validation_task_rows
from astuner.backbone.trinity.opening import desk


class EpisodeWorkflow(Workflow):  # pyright: ignore[reportUntypedBaseClass]
    """Found by its dotted path."""

    can_repeat = True
    is_async = True

    def set_repeat_times(self, repeat_times: int, run_id_base: int) -> None:
        """The job file says how often."""

    async def run_async(self) -> list[Any]:
        """The experiences of the whole group; at least one."""
        try:
            return [to_experience(row) for row in await self._rows()]
        except Exception as error:
            give_up(folder_of_process(), error)
            raise

    async def _rows(self) -> list[Row]:
        here, task = await desk(self.model), self.task
        index = int(task.raw_task["index"])
        if task.is_eval:  # the batch is called "STEP/NAME"
            return await validation_task_rows(here, index, int(str(task.batch_id).split("/")[0]))
        return await train_rows(here, index, int(task.batch_id), int(task.task_id))


def to_experience(row: Row) -> Any:
    """With the same fields set in every one; batch and task are Trinity's to set."""
    return Experience(
        eid=EID(run=row.run, step=row.step),
        tokens=torch.tensor(row.tokens, dtype=torch.int32),
        prompt_length=row.prompt_length,
        logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
        action_mask=torch.tensor(row.action_mask, dtype=torch.bool),
        advantages=torch.tensor(row.advantages, dtype=torch.float32),
        reward=row.reward,
        info={KEY: dict(row.told)},
        metrics={"reward": row.reward},
    )
