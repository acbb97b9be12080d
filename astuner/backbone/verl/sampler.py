"""verl's own samplers, which also note for the launcher what they took (`spawned.batches`).

verl finds the class by its name (`trainer.v1.sampler.custom_sampler`). Only with these
notes is it known which groups a step was trained on: rollouts that run ahead, groups that
are replaced, and those that a resumed run gets back from its checkpoint mix them.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import (  # pyright: ignore[reportMissingImports]
    ReplayBuffer,
    ReplayBufferAsync,
)

from astuner.backbone.spawned.batches import BatchRecord, note_batch
from astuner.backbone.spawned.files import folder_of_process

TRAIN = "train"
"""verl's partition."""


class _Noting:
    """Mixed into one of verl's samplers."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._left_out: set[str] = set()

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, Any]:
        """As verl's own. Raises OSError where it cannot be noted."""
        verl: Any = super()
        batch, metrics = verl.sample(global_steps, partition_id, batch_size)
        if partition_id == TRAIN:
            taken = tuple(dict.fromkeys(key.split("_")[0] for key in batch.keys))
            left_out = tuple(sorted(self._left_out))
            note_batch(folder_of_process(), BatchRecord(global_steps, taken, left_out))
            self._left_out = set()
        return batch, metrics

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        """verl calls it for groups that are too old or failed (replay_buffer.py:235)."""
        verl: Any = super()
        verl._clear_groups(partition_id, uids)
        if partition_id == TRAIN:
            self._left_out |= uids


class InTurns(_Noting, ReplayBuffer):  # pyright: ignore[reportUntypedBaseClass]
    """Of the synchronous trainer."""

    def __init__(self, **given: Any) -> None:
        # verl keeps its settings from a sampler that is not its own (trainer_base.py:165).
        super().__init__(**given, gen_batch_size=1, sync_refill_failed_groups=True)


class Ahead(_Noting, ReplayBufferAsync):  # pyright: ignore[reportUntypedBaseClass]
    """Of the asynchronous one."""
