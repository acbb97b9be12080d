"""What the training loop needs from the outside, and what it gives back.

Protocols only: the loop is blind to how groups are rolled out, how a policy is
evaluated, and where numbers are shown. `task_rollout`, `tracking` and the backbones
fit these shapes without importing them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from astuner.trainer.totals import Totals
from astuner.types import Episode, Group


class GroupSource(Protocol):
    """Where groups of finished episodes come from."""

    async def next_groups(self, step: int) -> list[Group]:
        """The groups to train on in this step (counted from 1). Cancelling it abandons
        the step; it may then be asked for the same step again, by a resumed run."""
        ...

    async def on_publish(self, version: int) -> None:
        """The engine now samples with this weight version."""
        ...

    def counters(self) -> Mapping[str, float]:
        """What happened since the previous call, to be logged under these names. The
        names `tokens_masked/REASON` are tokens that were sampled and dropped."""
        ...


@runtime_checkable
class RefillingSource(Protocol):
    """A source that can replace groups from which nothing is to be learnt."""

    async def refill(self, step: int, round: int, num_groups: int) -> list[Group]:
        """Further groups for this step, on other tasks; rounds count from 1."""
        ...


@runtime_checkable
class StatefulSource(Protocol):
    """A source whose order is not a function of the step alone."""

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint has to remember, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A validation. `score` is what the run is judged by (the mean reward or accuracy)."""

    score: float
    num: int
    """Episodes it is the mean of."""
    metrics: Mapping[str, float] = field(default_factory=dict)


Evaluate = Callable[[int], Awaitable[EvalResult]]
"""Validate the published weights; the argument is the number of finished steps."""


class Sinks(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


class EpisodeSink(Protocol):
    def append(self, step: int, episodes: Sequence[Episode]) -> None: ...


class Stop(Protocol):
    """threading.Event and asyncio.Event both are one."""

    def is_set(self) -> bool: ...


class Progress(Protocol):
    """Shows a person where the run is. Must not block."""

    def stage(self, name: str, step: int, total: int) -> None:
        """A stage begins: rollout, train, publish, checkpoint or eval."""
        ...

    def waiting(self, what: str, seconds: float) -> None:
        """`what` has not come for so long; called again and again until it does."""
        ...

    def step_done(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, result: EvalResult) -> None: ...

    def note(self, message: str) -> None:
        """A sentence worth reading, such as why a step trained nothing."""
        ...


class Silent:
    """Shows nothing, logs nothing, never stops: the default for everything optional."""

    def stage(self, name: str, step: int, total: int) -> None: ...
    def waiting(self, what: str, seconds: float) -> None: ...
    def step_done(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...
    def evaluated(self, step: int, result: EvalResult) -> None: ...
    def note(self, message: str) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def append(self, step: int, episodes: Sequence[Episode]) -> None: ...
    def is_set(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended."""

    steps: int
    """Completed, those before a resume included."""
    stopped: bool
    """Ended early because `stop` was set."""
    totals: Totals
    evals: Mapping[int, EvalResult]
    """By the number of finished steps; 0 is before training."""
    checkpoint: Path | None
    """The newest one on disk."""

    @property
    def eval_before(self) -> EvalResult | None:
        return self.evals.get(0)

    @property
    def eval_after(self) -> EvalResult | None:
        """That of the last completed step; None if it was not reached."""
        return self.evals.get(self.steps) if self.steps else None

    @property
    def best_eval(self) -> tuple[int, EvalResult] | None:
        """Step and result of the highest score, the earliest of equal ones."""
        return max(self.evals.items(), key=lambda e: (e[1].score, -e[0]), default=None)
