"""From what verl's processes write to what every backbone reports.

Follows the run's folder: groups that have ended, verl's line of metrics after each step,
the trainer's stage. Of them it makes our metrics under our names (verl's own go along as
`verl/NAME`), episodes, totals, validations and the progress display. What is known after
each step is kept (`spawned.states`), so that a resumed run counts on from its checkpoint.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from astuner.backbone.report import eval_result
from astuner.backbone.spawned.files import (
    METRICS,
    GroupRecord,
    SpoolReader,
    Stage,
    last_sign,
    read_stage,
)
from astuner.backbone.spawned.lines import LineReader
from astuner.backbone.spawned.states import keep_state
from astuner.tracking.display import NAMES as NAMES_OF_STAGES
from astuner.trainer.batch import MASKED, account, make_batch, sampled_tokens
from astuner.trainer.checkpoints import TrainerState
from astuner.trainer.metrics import batch_metrics, episode_metrics, staleness
from astuner.trainer.seams import EpisodeSink, Progress, Sinks
from astuner.trainer.settings import TrainSettings
from astuner.types import Episode, Group

STEP_DONE, VALIDATED = "training/global_step", "val-"
"""A key, and the beginning of keys, that only such a line has."""
EVICTED = "training/off_policy/evicted_samples"
"""Groups that verl threw away because they were too old."""
NAMES = {
    "actor/pg_loss": "policy/loss",
    "actor/grad_norm": "policy/grad_norm",
    "actor/lr": "policy/lr",
    "actor/entropy": "policy/entropy",
    "actor/kl_loss": "policy/reference_kl",
    "actor/pg_clipfrac": "policy/clipped",
    "rollout_corr/k3_kl": "policy/sampler_kl",
    "rollout_corr/rollout_is_mean": "policy/tis_weight",
    "timing_s/gen": "seconds/rollout",
    "timing_s/update_weights": "seconds/publish",
    "timing_s/save_checkpoint": "seconds/checkpoint",
    "timing_s/testing": "seconds/eval",
    "timing_s/step": "seconds/step",
}
"""verl's name -> ours, where both mean the same."""
TRAINING = ("old_log_prob", "ref", "adv", "update_actor")
"""verl's timers that make up our `seconds/train`."""


class Follower:
    """Reads what is new and passes it on. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        settings: TrainSettings,
        *,
        batch_size: int,
        sinks: Sinks,
        episodes: EpisodeSink,
        display: Progress,
        state: TrainerState,
        takes_turns: bool = True,
    ) -> None:
        """`takes_turns` is False where rollouts run ahead of the trainer."""
        self.state = state
        self._folder = folder
        self._settings = settings
        self._batch_size = batch_size
        self._sinks = sinks
        self._episodes = episodes
        self._display = display
        self._lines = LineReader(folder / METRICS)
        self._spool = SpoolReader(folder)
        self._waiting = Waiting(batch_size, takes_turns)
        self._stage: Stage | None = None
        self._read = 0

    def poll(self) -> None:
        """Everything that has come since the last call. Raises OSError when it cannot be kept."""
        self._show_stage()
        lines = self._lines.new()  # first: the groups of a step are spooled before its line
        for record in self._spool.new():
            self._read += 1
            self._waiting.add(record)
            for episode in record.episodes:
                self._show_episode(episode)
        for line in lines:
            self._read += 1
            self._line(int(line["step"]), _numbers(line["data"]))

    def signs(self) -> object:
        """Differs from the last time if any process has shown life."""
        return self._read, read_stage(self._folder), last_sign(self._folder)

    @property
    def waits_for(self) -> str:
        """In words."""
        return NAMES_OF_STAGES.get(stage.name, stage.name) if (stage := self._stage) else "verl"

    # ---------------------------------------------------------------- shown at once

    def _show_stage(self) -> None:
        stage = read_stage(self._folder)
        if stage is not None and stage != self._stage:
            self._stage = stage
            self._display.stage(stage.name, stage.step, stage.total)

    def _show_episode(self, episode: Episode) -> None:
        if (show := getattr(self._display, "episode", None)) is not None:
            show(episode)

    # ---------------------------------------------------------------- after a step

    def _line(self, step: int, verl: Mapping[str, float]) -> None:
        if STEP_DONE in verl:
            self._step_done(step, verl)
        if any(name.startswith(VALIDATED) for name in verl):
            self._validated(step, verl)
        keep_state(self._folder, self.state)

    def _step_done(self, step: int, verl: Mapping[str, float]) -> None:
        evicted = self._waiting.evict(int(verl.get(EVICTED, 0)))
        records = self._waiting.take(step)
        counters = _counters(records, evicted)
        batch = make_batch([_group(r, step) for r in records], self._settings)
        seconds = verl.get("timing_s/step", 0.0)
        spent = account(batch, counters, seconds)
        self.state = replace(self.state, step=step, totals=self.state.totals + spent)
        metrics = batch_metrics(batch) | episode_metrics(batch.episodes)
        metrics |= staleness(batch.samples, step - 1)  # verl's version is the finished steps
        metrics |= renamed(verl) | counters
        metrics["tokens/sampled"] = float(spent.tokens_sampled)
        metrics["speed/sampled_tokens_per_second"] = spent.tokens_sampled / max(seconds, 1e-9)
        if trained := metrics.get("seconds/train"):
            metrics["speed/trained_tokens_per_second"] = spent.tokens_trained / trained
        metrics["total/tokens_sampled"] = float(self.state.totals.tokens_sampled)
        metrics["total/tokens_trained"] = float(self.state.totals.tokens_trained)
        metrics.pop("seconds/eval", None)  # is told with the validation
        self._episodes.append(step, batch.episodes)
        self._sinks.log(step, metrics)
        self._display.step_done(step, self._settings.total_steps, metrics)

    def _validated(self, step: int, verl: Mapping[str, float]) -> None:
        episodes = self._waiting.validation.pop(step, [])
        if not episodes:
            return
        result = eval_result(episodes)
        self._episodes.append(step, episodes)
        self.state = replace(self.state, evals={**self.state.evals, step: result})
        metrics = {"eval/score": result.score, "eval/num": float(result.num)}
        metrics |= {f"eval/{name}": value for name, value in result.metrics.items()}
        if (seconds := verl.get("timing_s/testing")) is not None:
            metrics["seconds/eval"] = seconds
        self._sinks.log(step, metrics)
        self._display.evaluated(step, result)


@dataclass
class Waiting:
    """Groups that have ended and that no finished step has trained yet."""

    batch_size: int
    takes_turns: bool
    train: list[GroupRecord] = field(default_factory=list[GroupRecord])
    validation: defaultdict[int, list[Episode]] = field(
        default_factory=lambda: defaultdict[int, list[Episode]](list)
    )

    def add(self, record: GroupRecord) -> None:
        if record.split == "validation":
            self.validation[record.step] += record.episodes
        else:
            self.train.append(record)

    def evict(self, number: int) -> list[GroupRecord]:
        """The oldest groups, which verl has thrown away."""
        kept = sorted((r for r in self.train if r.kept), key=lambda r: r.step)
        gone = kept[:number]
        self.train = [r for r in self.train if r not in gone]
        return gone

    def take(self, step: int) -> list[GroupRecord]:
        """Those of the step that is finished: all that were started for it, or where rollouts
        run ahead a batch of the oldest, as verl's sampler chooses them, with the dropped ones."""
        begun = sorted((r for r in self.train if r.step <= step), key=lambda r: r.step)
        kept = [r for r in begun if r.kept]
        taken = kept if self.takes_turns else kept[: self.batch_size]
        taken += [r for r in begun if not r.kept]
        self.train = [r for r in self.train if r not in taken]
        return taken


# ---------------------------------------------------------------- names and numbers


def renamed(verl: Mapping[str, float]) -> dict[str, float]:
    """Under our names what we have a name for; and everything as `verl/NAME`."""
    ours = {name: verl[theirs] for theirs, name in NAMES.items() if theirs in verl}
    training = [verl[f"timing_s/{t}"] for t in TRAINING if f"timing_s/{t}" in verl]
    if training:
        ours["seconds/train"] = sum(training)
    return {f"verl/{name}": value for name, value in verl.items()} | ours


def _counters(records: Sequence[GroupRecord], evicted: Sequence[GroupRecord]) -> dict[str, float]:
    counters: Counter[str] = Counter()
    for record in records:
        counters.update(record.counters)  # pyright: ignore[reportArgumentType] (floats add too)
    if evicted:
        tokens = sum(sampled_tokens(e) for r in evicted for e in r.episodes)
        counters["rollout/groups_too_stale"] += len(evicted)
        counters[f"{MASKED}too_stale"] += tokens
    return {name: float(count) for name, count in counters.items()}


def _group(record: GroupRecord, step: int) -> Group:
    task = record.episodes[0].task
    return Group(record.group_id, task, record.episodes, born_version=max(0, record.step - 1))


def _numbers(data: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in data.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
