"""A bandit that is a whole training job: a numpy policy, and a source that samples from it.

One "reply" is one token of a vocabulary of 5; the policy is a vector of logits, trained
with momentum, so that a resume without optimizer state would show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astuner.algorithm.advantages import grpo
from astuner.algorithm.aggregation import episode_mean
from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LossSpec
from astuner.trainer import EvalResult, TrainSettings
from astuner.types import (
    Call,
    Episode,
    Failure,
    FailureKind,
    FinishReason,
    Group,
    MaskReason,
    Sample,
    Task,
    WorkflowOutput,
    token_ids,
)
from tests.spans import spans_of

PROMPT = 9
"""The one prompt token of every call."""


def call(
    episode_id: str,
    reply: Sequence[int] = (3,),
    *,
    logprob: float = -1.0,
    version: int = 0,
    finish: FinishReason = "stop",
) -> Call:
    n = len(reply)
    return Call(
        call_id=f"{episode_id}/0",
        episode_id=episode_id,
        agent_name="default",
        target_tag="default",
        prompt_ids=token_ids([PROMPT]),
        completion_ids=token_ids(reply),
        logprobs=np.full(n, logprob, np.float32),
        weight_versions=np.full(n, version, np.int32),
        finish_reason=finish,
        request={},
        response={},
        started_at=0.0,
        ended_at=1.0,
    )


def sample(c: Call, group_id: str, trained: bool = True) -> Sample:
    """The prompt token, then the reply."""
    n = len(c.completion_ids)
    masked = {MaskReason.CONTEXT: 1} if trained else {MaskReason.CONTEXT: 1, MaskReason.TOO_LONG: n}
    return Sample(
        sample_id=f"{c.episode_id}/s",
        episode_id=c.episode_id,
        group_id=group_id,
        task_id="t",
        agent_name="default",
        target_tag="default",
        token_ids=np.concatenate([c.prompt_ids, c.completion_ids]),
        loss_mask=np.array([False] + [trained] * n),
        logprobs=np.concatenate([np.zeros(1, np.float32), c.logprobs]),
        spans=spans_of([-1] + [0] * n, [-1, *c.weight_versions]),
        masked=masked,
    )


def episode(
    episode_id: str,
    group_id: str,
    reward: float | None,
    *,
    calls: Sequence[Call] | None = None,
    failure: Failure | None = None,
    trained: bool = True,
    turn_rewards: tuple[float, ...] | None = None,
    is_success: bool | None = None,
    log_metrics: Mapping[str, float] | None = None,
) -> Episode:
    calls = [call(episode_id)] if calls is None else calls
    return Episode(
        episode_id=episode_id,
        group_id=group_id,
        task=Task(task_id="t"),
        repeat_index=0,
        split="train",
        calls=tuple(calls),
        samples=() if failure else tuple(sample(c, group_id, trained) for c in calls),
        output=WorkflowOutput(reward=reward, log_metrics=dict(log_metrics or {})),
        reward=reward,
        turn_rewards=turn_rewards,
        is_success=is_success,
        failure=failure,
        started_at=0.0,
        ended_at=2.0,
    )


def group(group_id: str, rewards: Sequence[float | None]) -> Group:
    """One episode a reward, a reply of one token each; None is a failed one."""
    crash = Failure(FailureKind.WORKFLOW, "boom")
    episodes = [
        episode(f"{group_id}/{i}", group_id, r, failure=crash if r is None else None)
        for i, r in enumerate(rewards)
    ]
    return Group(group_id, Task(task_id="t"), tuple(episodes), born_version=0)


def settings(**changes: Any) -> TrainSettings:
    """GRPO over three steps, unless told otherwise."""
    defaults: dict[str, Any] = {
        "total_steps": 3,
        "estimator": grpo,
        "aggregation": episode_mean,
        "loss": LossSpec("policy_gradient"),
        "max_response_length": 8,
        "lr": 0.5,
        "val_before_train": False,
    }
    return TrainSettings(**(defaults | changes))


# ---------------------------------------------------------------- a policy


@dataclass
class ToyPolicy:
    """Logits [5]; the loss is -w A log pi, whatever its name. Records every verb."""

    logits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))
    momentum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))
    published: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))
    version: int = 0
    verbs: list[str] = field(default_factory=list)
    seen: list[tuple[Sample, ...]] = field(default_factory=list)
    before_save: Callable[[Path], None] | None = None
    before_backward: Callable[[], None] | None = None
    _gradient: NDArray[np.float64] = field(default_factory=lambda: np.zeros(5))

    def log_probs(self) -> NDArray[np.float64]:
        return self.logits - np.log(np.exp(self.logits).sum())

    def _of(self, s: Sample) -> NDArray[np.float32]:
        values = np.where(s.loss_mask, self.log_probs()[s.token_ids.clip(0, 4)], 0.0)
        return values.astype(np.float32)

    async def forward(
        self, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        self.verbs.append("forward")
        return tuple(self._of(s) for s in samples)

    async def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        if self.before_backward:
            self.before_backward()
        self.verbs.append("forward_backward")
        self.seen.append(tuple(samples))
        total = 0.0
        for s in samples:
            assert s.advantages is not None and s.weights is not None
            scale = (s.advantages * s.weights).astype(np.float64)
            total -= float((scale * self._of(s)).sum())
            for token, weight in zip(s.token_ids[s.loss_mask], scale[s.loss_mask], strict=True):
                self._gradient += weight * np.exp(self.log_probs())
                self._gradient[token] -= weight
        tokens = float(sum(len(s.token_ids) for s in samples))
        metrics = {"ratio": 1.0, "packed_tokens": tokens, "sample_tokens": tokens}
        return ForwardBackwardResult(total, tuple(self._of(s) for s in samples), metrics)

    async def optim_step(self, params: AdamParams) -> dict[str, float]:
        self.verbs.append("optim_step")
        norm = float(np.linalg.norm(self._gradient))
        self.momentum = 0.9 * self.momentum + self._gradient
        self.logits = self.logits - params.lr * self.momentum
        self._gradient = np.zeros(5)
        return {"grad_norm": norm, "lr": params.lr}

    async def publish(self) -> int:
        self.verbs.append("publish")
        self.published = self.logits.copy()
        self.version += 1
        return self.version

    async def save(self, path: Path, *, optimizer: bool) -> None:
        self.verbs.append("save")
        np.save(path / "logits.npy", self.logits)
        if self.before_save:
            self.before_save(path)
        np.save(path / "momentum.npy", self.momentum)

    async def load(self, path: Path, *, optimizer: bool) -> int:
        self.verbs.append("load")
        self.logits = np.load(path / "logits.npy")
        self.momentum = np.load(path / "momentum.npy")
        return await self.publish()


# ---------------------------------------------------------------- sources


@dataclass
class ScriptedSource:
    """Gives the groups it was told, step by step."""

    script: Mapping[int, Sequence[Group]]
    refills: Sequence[Sequence[Group]] = ()
    counted: Mapping[str, float] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    refill_asked: list[tuple[int, int, int]] = field(default_factory=list)
    published: list[int] = field(default_factory=list)
    before: Callable[[int], Any] | None = None

    async def next_groups(self, step: int) -> list[Group]:
        self.asked.append(step)
        if self.before:
            await self.before(step)
        return list(self.script[step])

    async def refill(self, step: int, round: int, num_groups: int) -> list[Group]:
        self.refill_asked.append((step, round, num_groups))
        return list(self.refills[round - 1])

    async def on_publish(self, version: int) -> None:
        self.published.append(version)

    def counters(self) -> Mapping[str, float]:
        return self.counted


@dataclass
class BanditSource:
    """Samples groups from the published policy; 1 for token 3. A function of the step."""

    policy: ToyPolicy
    before: Callable[[int], Any] | None = None
    published: list[int] = field(default_factory=list)

    async def next_groups(self, step: int) -> list[Group]:
        if self.before:
            await self.before(step)
        return [self._group(step, i) for i in range(4)]

    def _group(self, step: int, index: int) -> Group:
        rng = np.random.default_rng([step, index])
        chances = np.exp(self.policy.published) / np.exp(self.policy.published).sum()
        name = f"{step}.{index}"
        episodes: list[Episode] = []
        for i, token in enumerate(rng.choice(5, size=6, p=chances)):
            c = call(
                f"{name}/{i}",
                [int(token)],
                logprob=float(np.log(chances[token])),
                version=self.policy.version,
            )
            episodes.append(episode(c.episode_id, name, float(token == 3), calls=[c]))
        return Group(name, Task(task_id="t"), tuple(episodes), self.policy.version)

    async def on_publish(self, version: int) -> None:
        self.published.append(version)

    def counters(self) -> Mapping[str, float]:
        return {}


def chance_of_success(policy: ToyPolicy) -> Callable[[int], Any]:
    async def evaluate(step: int) -> EvalResult:
        chances = np.exp(policy.published) / np.exp(policy.published).sum()
        return EvalResult(float(chances[3]), 100, {"entropy": 1.0})

    return evaluate


@dataclass
class Log:
    """Sinks and progress that remember."""

    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    stored: list[tuple[int, int]] = field(default_factory=list)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def append(self, step: int, episodes: Sequence[Episode]) -> None:
        self.stored.append((step, len(episodes)))

    def stage(self, name: str, step: int, total: int) -> None:
        self.stages.append(f"{name} {step}/{total}")

    def waiting(self, what: str, seconds: float) -> None:
        self.waits.append(what)

    def step_done(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, result: EvalResult) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)
