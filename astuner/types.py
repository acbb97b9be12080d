"""The vocabulary that every room speaks.

What users write or receive (`Task`, `WorkflowTask`, `WorkflowOutput`) is
pydantic; what travels inside (`Call`, `Sample`, `Episode`, `Group`, ...) is
frozen dataclasses over small numpy arrays. No tensors, no HTTP and no
behaviour beyond what follows directly from the fields.

Dimension suffix: `_T` is one entry per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

TokenIds = NDArray[np.int32]
FinishReason = Literal["stop", "length", "cancelled"]
"""Why sampling ended: a stop token, the length limit, or the caller went away."""


def token_ids(ids: Sequence[int] | TokenIds) -> TokenIds:
    """Any sequence of ints as an int32 array [T] (no copy if it already is one)."""
    return np.asarray(ids, dtype=np.int32)


# ---------------------------------------------------------------- what users see


class Task(BaseModel):
    """One item of the dataset."""

    model_config = ConfigDict(extra="forbid")

    task_id: str = ""
    """Unique in its split; readers fill in the row number when the data has none."""
    main_query: str = ""
    """The question or instruction."""
    init_messages: list[dict[str, Any]] = Field(default_factory=list)
    """Optional opening messages in OpenAI form."""
    env_type: str = ""
    """The environment the task plays in, where it is not the configured `env.type`; without an
    `env` section a label for the workflow to read."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Everything else of the row, e.g. the reference answer under "answer"."""


class WorkflowTask(BaseModel):
    """A Task as one episode gets it."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    task: Task
    task_id: str = ""
    episode_id: str = ""
    repeat_index: int = 0
    """Which of the group's `num_repeat` episodes this is, from 0."""
    split: Literal["train", "validation"] = "train"
    gym_env: Any = None
    """The episode's environment (`astuner.env.GymEnv`) where the run's `env` section names one."""

    @property
    def main_query(self) -> str:
        return self.task.main_query

    @property
    def init_messages(self) -> list[dict[str, Any]]:
        return self.task.init_messages

    @property
    def metadata(self) -> dict[str, Any]:
        return self.task.metadata


class WorkflowOutput(BaseModel):
    """What the user's `execute` returns."""

    model_config = ConfigDict(extra="forbid")

    reward: float | list[float] | dict[str, float | list[float]] | None = None
    """One number for the episode; a list gives one per LLM call, in order of the
    calls; a dict gives each target tag its own number, or list over its own calls;
    None asks the judge."""
    is_success: bool | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    """For the judge and the episode store, e.g. the final answer."""
    log_metrics: dict[str, float] = Field(default_factory=dict)
    """Numbers of your own; each is averaged over the step and logged as `user/NAME`."""


# ---------------------------------------------------------------- what is recorded


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One answered LLM call, exactly as it was sampled."""

    call_id: str
    episode_id: str
    agent_name: str
    target_tag: str
    prompt_ids: TokenIds
    completion_ids: TokenIds
    logprobs: NDArray[np.float32]
    """Of the distribution each completion token was drawn from, shape of `completion_ids`."""
    weight_versions: NDArray[np.int32]
    """The weights that drew each completion token, shape of `completion_ids`."""
    finish_reason: FinishReason
    request: Mapping[str, Any]
    """The request (messages, tools, sampling fields) in Chat Completions form, whatever the
    dialect it came in."""
    response: Mapping[str, Any]
    """The assistant message as it was returned."""
    started_at: float
    """Unix seconds."""
    ended_at: float
    parent_id: str | None = None
    """The call whose prompt + completion this prompt extends verbatim, if any."""
    new_timeline_reason: str | None = None
    """Why the prompt was rendered anew, e.g. "first", "edited_history", "template_rewrites"."""
    prefill_cached: int = 0
    """How many prompt tokens the engine did not have to compute again."""


class MaskReason(StrEnum):
    """Why a token of a sample is not trained."""

    CONTEXT = "context"
    """Never sampled by the policy: prompts, tool results, template glue."""
    TRAINED_ELSEWHERE = "trained_elsewhere"
    """Sampled once, but already trained in another sample that shares this history."""
    NOT_A_TARGET = "not_a_target"
    """Sampled for an agent whose target tag is not in `trainable_targets`."""
    TOO_LONG = "too_long"
    """Beyond `max_prompt_length + max_response_length`."""


def _no_spans() -> NDArray[np.int32]:
    return np.zeros((0, 4), np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One timeline, ready to train: what a trainer eats. Arrays have shape [T], but `spans`."""

    sample_id: str
    episode_id: str
    group_id: str
    task_id: str
    agent_name: str
    target_tag: str
    token_ids: TokenIds
    loss_mask: NDArray[np.bool_]
    """True where the token was sampled and is trained here; never at position 0."""
    logprobs: NDArray[np.float32]
    """Behaviour logprobs; 0 where the token was not sampled."""
    spans: NDArray[np.int32] = field(default_factory=_no_spans)
    """Where what was sampled comes from: a row (start, stop, turn, weight version) for each run
    of tokens of one Call and one version, in order, shape [S, 4]. See `turns`."""
    reward: float = 0.0
    masked: Mapping[MaskReason, int] = field(default_factory=dict)
    """How many of this sample's tokens are not trained, and why."""
    advantages: NDArray[np.float32] | None = None
    """Per token; set by the trainer before `Policy.forward_backward`."""
    weights: NDArray[np.float32] | None = None
    """Per-token weight in the loss sum (see `algorithm.aggregation`); set by the trainer."""
    proximal_logprobs: NDArray[np.float32] | None = None
    """Logprobs under the weights at the start of the step, for decoupled PPO; optional."""
    target_ids: TokenIds | None = None
    """What is scored at each position, given the `token_ids` before it, where that is not
    `token_ids` itself; only samples that come from outside have it."""

    @property
    def num_trained(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def turns(self) -> NDArray[np.int32]:
        """Index of the Call in its episode (order of start); -1 where not sampled. Made anew
        from `spans` each time."""
        return self._of_spans(2)

    @property
    def weight_versions(self) -> NDArray[np.int32]:
        """-1 where the token was not sampled. Made anew from `spans` each time."""
        return self._of_spans(3)

    def _of_spans(self, column: int) -> NDArray[np.int32]:
        values = np.full(2 * len(self.spans) + 1, -1, np.int32)
        values[1::2] = self.spans[:, column]
        edges = np.concatenate([[0], self.spans[:, :2].ravel(), [len(self.token_ids)]])
        return np.repeat(values, np.diff(edges))


class FailureKind(StrEnum):
    """Which boundary an episode failed at."""

    WORKFLOW = "workflow"
    JUDGE = "judge"
    REWARD = "reward"
    ENGINE = "engine"
    ENVIRONMENT = "environment"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an episode has no usable reward. Data, not a crash."""

    kind: FailureKind
    message: str
    traceback: str = ""
    """The user's frames only, ready to print."""
    retriable: bool = False
    """True for infrastructure; false for the workflow's own bugs."""


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """One run of the workflow on one task."""

    episode_id: str
    group_id: str
    task: Task
    repeat_index: int
    split: Literal["train", "validation"]
    calls: tuple[Call, ...]
    samples: tuple[Sample, ...]
    output: WorkflowOutput | None
    reward: float | None
    """The episode's scalar: the mean of a reward list is not taken, its sum is. Of rewards by
    target, the mean over the trained ones."""
    turn_rewards: tuple[float, ...] | None
    """One per call when the workflow or judge gave a list."""
    is_success: bool | None
    failure: Failure | None
    started_at: float
    ended_at: float
    attempts: int = 1
    target_rewards: Mapping[str, tuple[float, ...]] | None = None
    """Target tag -> (its reward,), or one for each of its calls in order; only where the
    workflow or judge gave a dict."""

    @property
    def ok(self) -> bool:
        return self.failure is None


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The episodes of one task: the G of GRPO."""

    group_id: str
    task: Task
    episodes: tuple[Episode, ...]
    born_version: int
    """The weight version published when its first episode started."""

    @property
    def usable(self) -> tuple[Episode, ...]:
        """Episodes that have a reward and at least one call."""
        return tuple(e for e in self.episodes if e.ok and e.calls)

    @property
    def oldest_version(self) -> int:
        """The oldest weights that drew one of its tokens (`born_version` if none did).
        Agents that are not trained may well play with old ones; they do not count."""
        versions = [
            int(c.weight_versions.min())
            for e in self.usable
            for c in e.calls
            if len(c.weight_versions) and _may_be_trained(e, c)
        ]
        return min(versions, default=self.born_version)


def _may_be_trained(episode: Episode, call: Call) -> bool:
    return not episode.samples or any(
        s.num_trained and s.target_tag == call.target_tag for s in episode.samples
    )
