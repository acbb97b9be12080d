"""From what Trinity's processes write to what every backbone reports.

Which groups each step was trained on is what the sample strategy has noted; the numbers of
a step are those of Trinity's trainer (they go along as `trinity/NAME` too).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from astuner.backbone.spawned import following
from astuner.backbone.spawned.batches import BATCHES, BatchRecord, batch_record
from astuner.backbone.spawned.files import GroupRecord, SpoolReader, Stage, read_stage
from astuner.backbone.spawned.following import StepDone, counted, renamed
from astuner.backbone.spawned.lines import LineReader
from astuner.backbone.trinity.accounts import role_file
from astuner.backbone.trinity.experience import versions
from astuner.trainer.settings import TrainSettings
from astuner.types import Episode

TRAINER = "trainer"
"""Trinity's name of the role."""
NAMES = {
    "actor/pg_loss": "policy/loss",
    "grad_norm:mean": "policy/grad_norm",
    "actor/reference_kl": "policy/reference_kl",
    "actor/sampler_kl": "policy/sampler_kl",
    "actor/logprob_gap": "policy/logprob_gap",
    "actor/ratio": "policy/ratio",
    "actor/ppo_kl": "policy/ppo_kl",
    "time/read_experience": "seconds/rollout",
    "time/train_step": "seconds/train",
    "time/sync_weight": "seconds/publish",
    "time/save_checkpoint": "seconds/checkpoint",
}
"""Trinity's name -> ours, where both mean the same."""


class Follower(following.Follower):
    """Not thread-safe."""

    def __init__(
        self, folder: Path, settings: TrainSettings, *, validations: int, **to: Any
    ) -> None:
        """`validations`: the episodes of one. The rest as in every follower."""
        super().__init__(folder, settings, **to)
        self._validations = validations
        self._lines = LineReader(folder / role_file(TRAINER))
        self._batch_lines = LineReader(folder / BATCHES)
        self._spool = SpoolReader(folder)
        self._groups: dict[str, GroupRecord] = {}
        self._batches: dict[int, BatchRecord] = {}
        self._validated: defaultdict[int, list[Episode]] = defaultdict(list[Episode])
        self._counters: list[Mapping[str, float]] = []
        """Of the groups that have ended since the last step."""
        self._began = False

    def poll(self) -> None:
        """Everything that has come since the last call. Raises OSError when it cannot be kept."""
        lines = self._lines.new()  # first: what a step was made of is written before its line
        for record in map(batch_record, self._batch_lines.new()):
            self._batches[record.step] = record
        groups = self._spool.new()
        self.read(groups)
        for group in groups:
            self._take(group)
        for line in lines:
            self.reads += 1
            self._trained(int(line["step"]), line["data"])
        self.show(self._stage())

    def _stage(self) -> Stage | None:
        """Trinity's own say nothing after the start."""
        self._began = self._began or bool(self._groups)
        if not self._began:
            return read_stage(self.folder)
        step, total = self.state.step + 1, self.settings.total_steps
        return Stage("train" if step in self._batches else "rollout", min(step, total), total)

    def _take(self, record: GroupRecord) -> None:
        self._counters.append(record.counters)
        if record.split == "train":
            self._groups[record.group_id] = record
            return
        waiting = self._validated[record.step]
        waiting += record.episodes
        if len(waiting) >= self._validations:
            episodes = self._validated.pop(record.step)
            step = newest_version(episodes)
            if step not in self.state.evals:  # the explorer goes on after the last step
                self.validated(step, episodes)

    def _trained(self, step: int, trinity: Mapping[str, float]) -> None:
        batch = self._batches.pop(step, BatchRecord(step, ()))
        counters, self._counters = self._counters, []
        seconds = trinity.get("time/read_experience", 0.0) + trinity.get("time/train_step", 0.0)
        metrics = renamed(trinity, NAMES, "trinity")
        metrics |= {"policy/lr": self.settings.adam(step).lr, "seconds/step": seconds}
        records, stale = self._named(batch.groups), self._named(batch.left_out)
        self.step_done(StepDone(step, records, metrics, counted(counters, stale), seconds))

    def _named(self, groups: Sequence[str]) -> list[GroupRecord]:
        """Those that have been played in this attempt at the run; they are given once."""
        found = (self._groups.pop(name, None) for name in groups)
        return [record for record in found if record is not None]


def newest_version(episodes: Sequence[Episode]) -> int:
    """Of the weights that a validation was played with."""
    return max((v for episode in episodes for v in versions(episode)), default=0)
