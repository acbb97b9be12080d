"""The training loop: groups in, weights out, over a Policy.

A step is: get groups, leave out what teaches nothing, advantages and weights, one or
more optimizer updates, publish, log, checkpoint, validate. The loop does not know
where groups come from, which algorithm it runs, or what the policy is made of. A step
is completed when its weights are published; whatever ends the run, the last completed
step is what stays.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from astuner.engine.protocol import Policy
from astuner.errors import AstunerError, CheckpointError, ConfigError
from astuner.trainer.batch import Batch, account, make_batch, num_teaching
from astuner.trainer.checkpoints import Checkpoint, Checkpoints, TrainerState, check_resumable
from astuner.trainer.metrics import batch_metrics, episode_metrics, update_metrics
from astuner.trainer.seams import (
    EpisodeSink,
    EvalResult,
    Evaluate,
    GroupSource,
    Progress,
    RefillingSource,
    Silent,
    Sinks,
    StatefulSource,
    Stop,
    TrainResult,
)
from astuner.trainer.settings import TrainSettings
from astuner.trainer.totals import Totals
from astuner.trainer.update import update_policy
from astuner.trainer.waiting import Stopped, wait_for
from astuner.types import Group

T = TypeVar("T")


async def train(
    policy: Policy,
    source: GroupSource,
    evaluate: Evaluate,
    settings: TrainSettings,
    *,
    checkpoints: Checkpoints,
    sinks: Sinks | None = None,
    episodes: EpisodeSink | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
    resume_from: Checkpoint | None = None,
) -> TrainResult:
    """Train up to `settings.total_steps`, or until `stop` is set.

    With `resume_from` it loads that checkpoint and goes on with the step after it;
    without, the folder of `checkpoints` must have none. Setting `stop` abandons a
    rollout or a validation, lets an update finish, and saves.

    Raises CheckpointError (disk full, or a checkpoint of another run), DeadlineExceeded
    (no groups came), and what source, policy and `evaluate` raise; before raising, the
    last completed step is saved if it is not yet.
    """
    silent = Silent()
    loop = _Loop(
        policy,
        source,
        evaluate,
        settings,
        checkpoints,
        sinks=sinks or silent,
        episodes=episodes or silent,
        progress=progress or silent,
        stop=stop or silent,
    )
    await loop.begin(resume_from)
    try:
        await loop.run()
    except Stopped:
        await loop.save_if_newer()
        return loop.result(stopped=True)
    except CheckpointError:
        raise  # another attempt to save would fail as well
    except (AstunerError, OSError):
        await loop.save_if_newer()
        raise
    return loop.result(stopped=False)


@dataclass(slots=True)
class _Loop:
    """The state of one call of `train`."""

    policy: Policy
    source: GroupSource
    evaluate: Evaluate
    settings: TrainSettings
    checkpoints: Checkpoints
    sinks: Sinks
    episodes: EpisodeSink
    progress: Progress
    stop: Stop
    state: TrainerState = field(init=False)
    """As of the last completed step."""
    version: int = 0
    saved: Path | None = None
    saved_step: int = 0
    updating: bool = False
    """The weights are between two completed steps."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Of the stages since the last report."""

    # ------------------------------------------------------------ the run

    async def begin(self, resume_from: Checkpoint | None) -> None:
        settings = self.settings
        if settings.dynamic_sampling and not isinstance(self.source, RefillingSource):
            raise ConfigError(
                "trainer_common.algorithm.dynamic_sampling is on, but "
                f"{type(self.source).__name__} cannot refill a batch. Switch it off."
            )
        self.state = TrainerState(0, settings.seed, settings.config_hash)
        if resume_from is not None:
            await self._resume(resume_from)
        elif existing := self.checkpoints.latest():
            raise CheckpointError(
                f"{existing.path} is a checkpoint of an earlier run. Go on from it with "
                "--resume, or give this run another experiment_name."
            )

    async def run(self) -> None:
        total = self.settings.total_steps
        if self.state.step == 0 and self.settings.val_before_train:
            await self._validate()
        elif self._due(self.state.step, self.settings.test_freq):
            await self._validate()  # was killed between checkpoint and validation
        while self.state.step < total:
            if self.stop.is_set():
                raise Stopped
            await self._step(self.state.step + 1)
            await self._save_if_due()
            if self._due(self.state.step, self.settings.test_freq):
                await self._validate()

    def result(self, *, stopped: bool) -> TrainResult:
        state = self.state
        return TrainResult(state.step, stopped, state.totals, state.evals, self.saved)

    async def save_if_newer(self) -> None:
        """Save the last completed step, unless it is saved or the weights have moved on."""
        if self.state.step > self.saved_step and not self.updating:
            await self._save(rolling=self.state.step < self.settings.total_steps)

    # ------------------------------------------------------------ one step

    async def _step(self, step: int) -> None:
        started = time.monotonic()
        groups = await self._rollout(step)
        size = len(groups)
        if self.settings.dynamic_sampling:
            groups += await self._refill(step, groups)
        batch = make_batch(groups, self.settings, size=size)
        metrics = await self._update(step, batch)
        counters = self.source.counters()
        spent = account(batch, counters, time.monotonic() - started)
        source = self.source.state() if isinstance(self.source, StatefulSource) else {}
        self.state = replace(
            self.state, step=step, totals=self.state.totals + spent, source=dict(source)
        )
        self.updating = False
        self._report(batch, metrics | dict(counters), spent)

    async def _rollout(self, step: int) -> list[Group]:
        with self._stage("rollout", step):
            return await self._wait(
                self.source.next_groups(step), f"The groups of step {step}", rollout=True
            )

    async def _refill(self, step: int, groups: list[Group]) -> list[Group]:
        """More groups, until as many teach something as there were tasks, or we give up."""
        assert isinstance(self.source, RefillingSource)  # checked in `begin`
        more: list[Group] = []
        with self._stage("rollout", step):
            for number in range(1, self.settings.max_refill_rounds + 1):
                missing = len(groups) - num_teaching([*groups, *more], self.settings)
                if missing <= 0:
                    break
                what = f"Refill {number} of step {step} ({missing} groups)"
                work = self.source.refill(step, number, missing)
                more += await self._wait(work, what, rollout=True)
        return more

    async def _update(self, step: int, batch: Batch) -> dict[str, float]:
        """Train and publish; nothing of it when there is nothing to learn."""
        metrics = batch_metrics(batch) | episode_metrics(batch.episodes)
        if not batch.mini_batches:
            reasons = ", ".join(f"{n} {r}" for r, n in batch.skipped_groups.items())
            self.progress.note(f"Step {step} trained nothing ({reasons or 'no groups came'}).")
            return metrics | {"policy/lr": 0.0}
        with self._stage("train", step):
            update = await update_policy(
                self.policy,
                batch.mini_batches,
                self.settings.loss,
                self.settings.adam(step),
                before_step=self._weights_move,
            )
        metrics |= update_metrics(update, batch.samples, self.version)
        with self._stage("publish", step):
            self.version = await self.policy.publish()
            await self.source.on_publish(self.version)
        return metrics

    def _weights_move(self) -> None:
        self.updating = True

    def _report(self, batch: Batch, metrics: dict[str, float], spent: Totals) -> None:
        """`seconds/checkpoint` is of the checkpoint before this step."""
        step, seconds = self.state.step, spent.train_seconds
        metrics |= {f"seconds/{stage}": taken for stage, taken in self.seconds.items()}
        metrics["seconds/step"] = seconds
        metrics["tokens/sampled"] = float(spent.tokens_sampled)
        metrics["speed/sampled_tokens_per_second"] = spent.tokens_sampled / max(seconds, 1e-9)
        if train := self.seconds.get("train"):
            metrics["speed/trained_tokens_per_second"] = spent.tokens_trained / train
        metrics["total/tokens_sampled"] = float(self.state.totals.tokens_sampled)
        metrics["total/tokens_trained"] = float(self.state.totals.tokens_trained)
        self.seconds.clear()
        self.episodes.append(step, batch.episodes)
        self.sinks.log(step, metrics)
        self.progress.step_done(step, self.settings.total_steps, metrics)

    # ------------------------------------------------------------ checkpoints, validation

    async def _resume(self, checkpoint: Checkpoint) -> None:
        if changed := check_resumable(checkpoint, self.settings):
            self.progress.note(changed)
        self.version = await self.policy.load(checkpoint.path, optimizer=True)
        if isinstance(self.source, StatefulSource):
            self.source.restore(checkpoint.state.source)
        self.state = checkpoint.state
        self.saved, self.saved_step = checkpoint.path, checkpoint.state.step

    async def _save_if_due(self) -> None:
        step = self.state.step
        if self._due(step, self.settings.save_freq):
            await self._save(rolling=False)
        elif self.settings.resume_freq and step % self.settings.resume_freq == 0:
            await self._save(rolling=True)

    async def _save(self, *, rolling: bool) -> None:
        started = time.monotonic()
        with self._stage("checkpoint", self.state.step):
            self.saved = await self.checkpoints.save(self.policy, self.state, rolling=rolling)
        self.saved_step = self.state.step
        spent = Totals(train_seconds=time.monotonic() - started)
        self.state = replace(self.state, totals=self.state.totals + spent)

    async def _validate(self) -> None:
        step = self.state.step
        if step in self.state.evals:
            return
        with self._stage("eval", step):
            result = await self._wait(self._evaluated(step), f"The validation after step {step}")
        self.state = replace(self.state, evals={**self.state.evals, step: result})
        if not result.num:  # no validation tasks: a score of nothing is not 0
            self.seconds.pop("eval")
            return
        metrics = {"eval/score": result.score, "eval/num": float(result.num)}
        metrics |= {f"eval/{name}": value for name, value in result.metrics.items()}
        metrics["seconds/eval"] = self.seconds.pop("eval")
        self.sinks.log(step, metrics)
        self.progress.evaluated(step, result)

    async def _evaluated(self, step: int) -> EvalResult:
        return await self.evaluate(step)

    # ------------------------------------------------------------ small things

    def _due(self, step: int, every: int) -> bool:
        """Every `every` steps, and always after the last one."""
        return step == self.settings.total_steps or (every > 0 and step > 0 and step % every == 0)

    async def _wait(self, work: Coroutine[Any, Any, T], what: str, *, rollout: bool = False) -> T:
        return await wait_for(
            work,
            what,
            stop=self.stop,
            waiting=self.progress.waiting,
            notice_seconds=self.settings.notice_seconds,
            deadline=self.settings.rollout_deadline if rollout else 0.0,
        )

    @contextmanager
    def _stage(self, name: str, step: int) -> Generator[None]:
        self.progress.stage(name, step, self.settings.total_steps)
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
