"""Trinity's sample strategy (`algorithm.sample_strategy`): batches of whole groups, weighed.

Trinity counts experiences, of which an episode may leave several. Here a batch is
`buffer.batch_size` groups, however many rows they have, so that one step of the explorer is
one step of the trainer. The rows get the weights of the configured aggregation over the
whole batch; groups too old are left out and replaced, and rows of which nothing is to be
learnt are weighed and then left out. Which groups a step was trained on goes to the
launcher. Once the run is asked to stop there are no more batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trinity.algorithm.sample_strategy.sample_strategy import (  # pyright: ignore[reportMissingImports]
    DefaultSampleStrategy,
)
from trinity.common.experience import CustomField  # pyright: ignore[reportMissingImports]

from astuner.backbone.spawned.files import STOP, folder_of_process, read_job, sign_of_life
from astuner.backbone.trinity.accounts import BatchRecord, note_batch
from astuner.backbone.trinity.experience import KEY
from astuner.backbone.trinity.weighing import weights_of
from astuner.config.schema import AstunerConfig

WEIGHTS = "weights"
"""Of each response token: an entry of `info`, and what `loss` calls it."""


class WholeBatches(DefaultSampleStrategy):  # pyright: ignore[reportUntypedBaseClass]
    """Found by its dotted path."""

    def __init__(self, buffer_config: Any, *, max_staleness: int = 0, **_: Any) -> None:
        super().__init__(buffer_config)
        self._groups: int = buffer_config.batch_size
        self._max_staleness = max_staleness
        self._folder = folder_of_process()
        self._config: AstunerConfig = read_job(self._folder).config

    async def sample(self, step: int, **_: Any) -> tuple[list[Any], dict[str, float], list[Any]]:
        """The rows of one step. Raises StopAsyncIteration when there are to be no more."""
        groups: list[list[Any]] = []
        stale: list[str] = []
        while len(groups) < self._groups:
            if (self._folder / STOP).exists():
                raise StopAsyncIteration
            group = await self._group()
            sign_of_life(self._folder, f"a group came for step {step}")
            if self._max_staleness and oldest(group) < step - 1 - self._max_staleness:
                stale.append(group[0].info[KEY]["group"])
            else:
                groups.append(group)
        rows = weighed(groups, self._config)
        used = tuple(group[0].info[KEY]["group"] for group in groups)
        note_batch(self._folder, BatchRecord(step, used, tuple(stale)))
        metrics = {"sample/rows": float(len(rows)), "sample/groups_too_stale": float(len(stale))}
        self.set_model_version_metric(rows, metrics)
        return rows, metrics, []

    async def _group(self) -> list[Any]:
        """All rows of the next group: each of them says how many there are."""
        [first] = await self.exp_buffer.read(batch_size=1)
        more = first.info[KEY]["rows"] - 1
        return [first, *(await self.exp_buffer.read(batch_size=more) if more else ())]

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        return {"max_staleness": 0}


def oldest(group: Sequence[Any]) -> int:
    """The oldest weights that sampled a token of it."""
    return min(exp.info[KEY]["oldest"] for exp in group)


def weighed(groups: Sequence[Sequence[Any]], config: AstunerConfig) -> list[Any]:
    """The rows of a step, each with a weight for every response token. Trinity's trainer
    divides the sum of the rows' losses by their number (trainer/tinker/tinker_trainer.py:245),
    which is put into the weights."""
    rows = [exp for group in groups for exp in group]
    masks = [exp.action_mask.bool().numpy() for exp in rows]
    episodes = [exp.info[KEY]["group"] + "/" + exp.info[KEY]["episode"] for exp in rows]
    trainer = config.trainer_common
    weights = weights_of(
        episodes, masks, trainer.algorithm.loss_agg_mode, config.data.max_response_length
    )
    taught = [bool(exp.advantages.any()) or trainer.use_kl_loss for exp in rows]
    chosen = [i for i, teaches in enumerate(taught) if teaches and masks[i].any()] or [0]
    for i in chosen:
        rows[i].info[WEIGHTS] = (weights[i] * len(chosen)).tolist()
        rows[i].custom_fields = [CustomField(WEIGHTS, WEIGHTS, torch.float32)]
    return [rows[i] for i in chosen]
