"""What a launcher makes of what its trainer's processes write: the part that all have alike.

Groups that have ended are read from the run's folder and shown. Of those that a step was
trained on, and of the trainer's own numbers for it, come the step's metrics, its episodes
and the totals; of a validation its score. What is known after each step is kept
(`states`), so that a resumed run counts on from its checkpoint. Which groups a step was
trained on, and where its numbers come from, each backbone's own `Follower` knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from astuner.backbone.report import eval_result
from astuner.backbone.spawned.files import GroupRecord, Stage, read_stage, signs
from astuner.backbone.spawned.states import keep_state
from astuner.tracking.display import NAMES
from astuner.trainer.batch import MASKED, account, make_batch, sampled_tokens
from astuner.trainer.checkpoints import TrainerState
from astuner.trainer.metrics import batch_metrics, episode_metrics, staleness
from astuner.trainer.seams import EpisodeSink, Progress, Sinks
from astuner.trainer.settings import TrainSettings
from astuner.types import Episode, Group


@dataclass(frozen=True)
class StepDone:
    """A step of the trainer."""

    step: int
    records: Sequence[GroupRecord]
    """The groups that it was trained on, and those that it got nothing of."""
    metrics: Mapping[str, float]
    """The trainer's own numbers: under our names where we have one, and under its own."""
    counters: Mapping[str, float]
    """Of the rollout."""
    seconds: float


class Follower:
    """Passes on what is new. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        settings: TrainSettings,
        *,
        sinks: Sinks,
        episodes: EpisodeSink,
        display: Progress,
        state: TrainerState,
    ) -> None:
        """`folder` is that of `files`; `state` is what is known after the last step."""
        self.state = state
        self.folder = folder
        self.settings = settings
        self.display = display
        self.stage: Stage | None = None
        """The one shown."""
        self.reads = 0
        """Of anything that the processes wrote."""
        self._sinks = sinks
        self._episodes = episodes

    def signs(self) -> object:
        """Differs from the last time if any process has shown life."""
        return self.reads, read_stage(self.folder), signs(self.folder)

    @property
    def waits_for(self) -> str:
        """In words."""
        return NAMES.get(self.stage.name, self.stage.name) if self.stage else "the first process"

    def show(self, stage: Stage | None) -> None:
        """Where the trainer is; once."""
        if stage is not None and stage != self.stage:
            self.stage = stage
            self.display.stage(stage.name, stage.step, stage.total)

    def read(self, records: Sequence[GroupRecord]) -> None:
        """Groups have ended: shows their episodes."""
        self.reads += len(records)
        if (show := getattr(self.display, "episode", None)) is not None:
            for episode in (e for record in records for e in record.episodes):
                show(episode)

    def step_done(self, done: StepDone) -> None:
        """Raises OSError when it cannot be kept."""
        batch = make_batch([_group(record) for record in done.records], self.settings)
        spent = account(batch, done.counters, done.seconds)
        totals = self.state.totals + spent
        self.state = replace(self.state, step=done.step, totals=totals)
        metrics = batch_metrics(batch) | episode_metrics(batch.episodes)
        # The version of such a trainer's weights is the number of finished steps.
        metrics |= staleness(batch.samples, done.step - 1)
        metrics |= {**done.metrics, **done.counters}
        metrics["tokens/sampled"] = float(spent.tokens_sampled)
        if done.seconds:
            metrics["speed/sampled_tokens_per_second"] = spent.tokens_sampled / done.seconds
        if trained := metrics.get("seconds/train"):
            metrics["speed/trained_tokens_per_second"] = spent.tokens_trained / trained
        metrics["total/tokens_sampled"] = float(totals.tokens_sampled)
        metrics["total/tokens_trained"] = float(totals.tokens_trained)
        self._episodes.append(done.step, batch.episodes)
        self._sinks.log(done.step, metrics)
        self.display.step_done(done.step, self.settings.total_steps, metrics)
        keep_state(self.folder, self.state)

    def validated(
        self, step: int, episodes: Sequence[Episode], seconds: float | None = None
    ) -> None:
        """A validation of the weights after this step has ended. Raises OSError."""
        result = eval_result(episodes)
        self._episodes.append(step, episodes)
        self.state = replace(self.state, evals={**self.state.evals, step: result})
        metrics = {"eval/score": result.score, "eval/num": float(result.num)}
        metrics |= {f"eval/{name}": value for name, value in result.metrics.items()}
        if seconds is not None:
            metrics["seconds/eval"] = seconds
        self._sinks.log(step, metrics)
        self.display.evaluated(step, result)
        keep_state(self.folder, self.state)


def renamed(theirs: Mapping[str, float], names: Mapping[str, str], prefix: str) -> dict[str, float]:
    """A trainer's numbers under our names where `names` has one, and all as PREFIX/NAME."""
    ours = {names[name]: value for name, value in theirs.items() if name in names}
    return {f"{prefix}/{name}": value for name, value in theirs.items()} | ours


def counted(
    counters: Iterable[Mapping[str, float]], stale: Sequence[GroupRecord]
) -> dict[str, float]:
    """Summed; and how much was left out because it was too old."""
    counts: Counter[str] = Counter()
    for of_group in counters:
        counts.update(of_group)  # pyright: ignore[reportArgumentType] (floats add too)
    if stale:
        counts["rollout/groups_too_stale"] += len(stale)
        tokens = sum(sampled_tokens(e) for record in stale for e in record.episodes)
        counts[f"{MASKED}too_stale"] += tokens
    return {name: float(count) for name, count in counts.items()}


def _group(record: GroupRecord) -> Group:
    born = max(0, record.step - 1)
    return Group(record.group_id, record.episodes[0].task, record.episodes, born_version=born)
