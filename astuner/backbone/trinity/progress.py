"""From what Trinity's processes write to what every backbone reports.

Follows the run's folder: groups that have ended, which of them each step was trained on,
Trinity's metrics of its trainer. Of them it makes our metrics under our names (Trinity's
own go along as `trinity/NAME`), episodes, totals, validations and the progress display.
What is known after each step is kept, so that a resumed run counts on from its checkpoint.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from astuner.backbone.report import eval_result
from astuner.backbone.spawned.batches import BATCHES, BatchRecord, batch_record
from astuner.backbone.spawned.files import GroupRecord, SpoolReader, Stage, last_sign, read_stage
from astuner.backbone.spawned.lines import LineReader
from astuner.backbone.spawned.states import keep_state
from astuner.backbone.trinity.accounts import role_file
from astuner.backbone.trinity.experience import versions
from astuner.trainer.batch import MASKED, account, make_batch, sampled_tokens
from astuner.trainer.checkpoints import TrainerState
from astuner.trainer.metrics import batch_metrics, episode_metrics, staleness
from astuner.trainer.seams import EpisodeSink, Progress, Sinks
from astuner.trainer.settings import TrainSettings
from astuner.types import Episode, Group

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


class Follower:
    """Reads what is new and passes it on. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        settings: TrainSettings,
        *,
        validations: int,
        sinks: Sinks,
        episodes: EpisodeSink,
        display: Progress,
        state: TrainerState,
    ) -> None:
        """`validations`: the episodes of one."""
        self.state = state
        self._folder = folder
        self._settings = settings
        self._validations = validations
        self._sinks = sinks
        self._episodes = episodes
        self._display = display
        self._lines = LineReader(folder / role_file(TRAINER))
        self._batch_lines = LineReader(folder / BATCHES)
        self._spool = SpoolReader(folder)
        self._groups: dict[str, GroupRecord] = {}
        self._batches: dict[int, BatchRecord] = {}
        self._validated: defaultdict[int, list[Episode]] = defaultdict(list[Episode])
        self._counters: Counter[str] = Counter()
        self._stage: Stage | None = None
        self._began = False
        self._read = 0

    def poll(self) -> None:
        """Everything that has come since the last call. Raises OSError when it cannot be kept."""
        lines = self._lines.new()  # first: what a step was made of is written before its line
        for line in self._batch_lines.new():
            record = batch_record(line)
            self._batches[record.step] = record
        for record in self._spool.new():
            self._read += 1
            self._take(record)
        for line in lines:
            self._read += 1
            self._step_done(int(line["step"]), line["data"])
        self._show_stage()

    def signs(self) -> object:
        """Differs from the last time if any process has shown life."""
        return self._read, read_stage(self._folder), last_sign(self._folder)

    @property
    def waits_for(self) -> str:
        """In words."""
        return self._stage.name if self._stage else "trinity"

    # ---------------------------------------------------------------- shown at once

    def _show_stage(self) -> None:
        stage = read_stage(self._folder)
        total, step = self._settings.total_steps, self.state.step
        if self._groups or self._began:
            self._began = True
            begun = step + 1 in self._batches
            stage = Stage("train" if begun else "rollout", min(step + 1, total), total)
        if stage is not None and stage != self._stage:
            self._stage = stage
            self._display.stage(stage.name, stage.step, stage.total)

    def _take(self, record: GroupRecord) -> None:
        self._counters.update(record.counters)  # pyright: ignore[reportArgumentType]
        for episode in record.episodes:
            if (show := getattr(self._display, "episode", None)) is not None:
                show(episode)
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

    # ---------------------------------------------------------------- after a step

    def _step_done(self, step: int, trinity: Mapping[str, float]) -> None:
        batch_of = self._batches.pop(step, BatchRecord(step, ()))
        records = [r for name in batch_of.groups if (r := self._groups.pop(name, None)) is not None]
        stale = [r for name in batch_of.left_out if (r := self._groups.pop(name, None)) is not None]
        counters = self._take_counters(stale)
        batch = make_batch([_group(record) for record in records], self._settings)
        seconds = trinity.get("time/read_experience", 0.0) + trinity.get("time/train_step", 0.0)
        spent = account(batch, counters, seconds)
        self.state = replace(self.state, step=step, totals=self.state.totals + spent)
        metrics = batch_metrics(batch) | episode_metrics(batch.episodes)
        metrics |= staleness(batch.samples, step - 1)  # Trinity's version is the finished steps
        metrics |= renamed(trinity) | counters
        metrics["policy/lr"] = self._settings.adam(step).lr
        metrics["seconds/step"] = seconds
        metrics["tokens/sampled"] = float(spent.tokens_sampled)
        metrics["speed/sampled_tokens_per_second"] = spent.tokens_sampled / max(seconds, 1e-9)
        if trained := metrics.get("seconds/train"):
            metrics["speed/trained_tokens_per_second"] = spent.tokens_trained / trained
        metrics["total/tokens_sampled"] = float(self.state.totals.tokens_sampled)
        metrics["total/tokens_trained"] = float(self.state.totals.tokens_trained)
        self._episodes.append(step, batch.episodes)
        self._sinks.log(step, metrics)
        self._display.step_done(step, self._settings.total_steps, metrics)
        self._keep()

    def validated(self, step: int, episodes: Sequence[Episode]) -> None:
        """A validation of the weights after this step has ended."""
        result = eval_result(episodes)
        self._episodes.append(step, episodes)
        self.state = replace(self.state, evals={**self.state.evals, step: result})
        metrics = {"eval/score": result.score, "eval/num": float(result.num)}
        metrics |= {f"eval/{name}": value for name, value in result.metrics.items()}
        self._sinks.log(step, metrics)
        self._display.evaluated(step, result)
        self._keep()

    def _take_counters(self, stale: Sequence[GroupRecord]) -> dict[str, float]:
        counters, self._counters = self._counters, Counter()
        if stale:
            counters["rollout/groups_too_stale"] += len(stale)
            tokens = sum(sampled_tokens(e) for record in stale for e in record.episodes)
            counters[f"{MASKED}too_stale"] += tokens
        return {name: float(count) for name, count in counters.items()}

    def _keep(self) -> None:
        keep_state(self._folder, self.state)


def renamed(trinity: Mapping[str, float]) -> dict[str, float]:
    """Under our names what we have a name for; and everything as `trinity/NAME`."""
    ours = {name: trinity[theirs] for theirs, name in NAMES.items() if theirs in trinity}
    return {f"trinity/{name}": value for name, value in trinity.items()} | ours


def newest_version(episodes: Sequence[Episode]) -> int:
    """Of the weights that a validation was played with."""
    return max((v for episode in episodes for v in versions(episode)), default=0)


def _group(record: GroupRecord) -> Group:
    episodes: tuple[Any, ...] = record.episodes
    return Group(record.group_id, episodes[0].task, record.episodes, born_version=0)
