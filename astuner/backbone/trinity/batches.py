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
from copy import copy
from typing import Any

import torch
from trinity.algorithm.sample_strategy.sample_strategy import (  # pyright: ignore[reportMissingImports]
    DefaultSampleStrategy,
)

from astuner.backbone.spawned.batches import BatchRecord, note_batch
from astuner.backbone.spawned.files import STOP, folder_of_process, read_job, sign_of_life
from astuner.backbone.trinity.experience import KEY
from astuner.backbone.trinity.weighing import weights_of
from astuner.config.schema import AstunerConfig


class WholeBatches(DefaultSampleStrategy):  # pyright: ignore[reportUntypedBaseClass]
    """Found by its dotted path."""

    def __init__(
        self, buffer_config: Any, *, max_staleness: int = 0, multiple_of: int = 0, **_: Any
    ) -> None:
        super().__init__(buffer_config)
        self._groups: int = buffer_config.batch_size
        self._max_staleness = max_staleness
        self._multiple_of = multiple_of
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
        rows = weighed(groups, self._config, self._multiple_of)
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
        return {"max_staleness": 0, "multiple_of": 0}


def oldest(group: Sequence[Any]) -> int:
    """The oldest weights that sampled a token of it."""
    return min(exp.info[KEY]["oldest"] for exp in group)


def weighed(groups: Sequence[Sequence[Any]], config: AstunerConfig, multiple_of: int) -> list[Any]:
    """The rows of a step, each with a weight for every response token as its `returns`, which
    Trinity hands to the loss, padded where it pads the rest. Trinity's trainers sum the rows'
    losses (`learning` sees to it), so the weights are whole."""
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
        rows[i].returns = torch.from_numpy(weights[i])
    return filled([rows[i] for i in chosen], multiple_of)


def filled(rows: list[Any], multiple_of: int) -> list[Any]:
    """With rows that train nothing, up to the next multiple: verl's trainer takes no less, and
    one optimizer step for each (verl 0.8.0, workers/engine_workers.py:262). 0 adds none."""
    missing = -len(rows) % multiple_of if multiple_of else 0
    shortest = min(rows, key=lambda exp: len(exp.tokens))
    nothing = copy(shortest)
    nothing.action_mask = torch.zeros_like(shortest.action_mask)
    nothing.advantages = torch.zeros_like(shortest.advantages)
    nothing.returns = torch.zeros_like(shortest.returns)
    return rows + [nothing] * missing
