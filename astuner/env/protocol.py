"""What an environment is, from both sides.

`TextEnv` is what somebody who brings a world writes: Gymnasium's reset and step, with text.
`EnvClient` is what everything above speaks: the instances of some environments, by id,
whether they live in this process or in a service. Every wait on one has a deadline, and
whatever goes wrong is an `EnvError`. Nothing here runs an environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from astuner.errors import EnvError

Message = Mapping[str, Any]
Observation = str | list[dict[str, Any]]
"""Text, or chat messages in OpenAI form where there are several or they have roles."""
Action = Any
"""Text (a model's reply), a chat message, or a plain value such as an action's number."""
Info = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Start:
    """A new episode of an environment."""

    observation: Observation
    info: Info = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class StepResult:
    """What Gymnasium's `step` returns."""

    observation: Observation
    reward: float
    terminated: bool
    """The task has ended (reached, failed)."""
    truncated: bool
    """It was cut short from outside, e.g. by a limit of steps."""
    info: Info = field(default_factory=dict[str, Any])

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call says besides its action; environments that take it may heed it."""

    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    messages: Any = field(default_factory=dict[str, Any])
    """With `evaluate` and `info`: one chat message or several."""


NOTHING = Asked()


class TextEnv(Protocol):
    """One instance of a world, as its author writes it: plain, blocking, one thread.

    It is made by a class or function `(task_id, params)`. Optional further members:
    `evaluate() -> float` (else the sum of the rewards is the score), `get_info() -> Any`, and
    `close()`. Where `step`, `evaluate` or `get_info` take further arguments by position they
    get the call's parameters (empty if it has none), and the last two then its messages. The
    maker may have `task_ids(split) -> list[str]`.
    """

    def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]: ...
    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]: ...


class EnvMaker(Protocol):
    """Makes instances of one environment."""

    def __call__(self, task_id: str, params: dict[str, Any]) -> TextEnv: ...


class EnvClient(Protocol):
    """Instances of environments, by id. All methods raise EnvError."""

    async def create(
        self, env_type: str, task_id: str, instance_id: str, params: Mapping[str, Any]
    ) -> Start: ...
    async def reset(self, instance_id: str, seed: int | None) -> Start: ...
    async def step(self, instance_id: str, action: Action, asked: Asked = ...) -> StepResult: ...
    async def evaluate(self, instance_id: str, asked: Asked = ...) -> float: ...
    async def info(self, instance_id: str, asked: Asked = ...) -> Any:
        """Whatever else the environment tells, e.g. its tools."""
        ...

    async def release(self, instance_id: str) -> None:
        """Free what the instance holds; an unknown id is fine."""
        ...

    async def task_ids(self, env_type: str, split: str) -> list[str]:
        """The tasks of a split, where the environment has a list of them; else []."""
        ...

    async def keep_alive(self, instance_ids: Sequence[str]) -> None:
        """Say that these are still wanted, though nothing was asked of them for a while."""
        ...

    async def aclose(self) -> None: ...


def as_observation(shown: object, what: str) -> Observation:
    """What an environment showed, if it is text or chat messages. Raises EnvError else."""
    if isinstance(shown, str):
        return shown
    if isinstance(shown, list) and all(isinstance(m, Mapping) for m in cast(list[object], shown)):
        return [dict(message) for message in cast(list[Message], shown)]
    raise EnvError(
        f"The environment's {what} is {shown!r:.200}; it must be text, or a list of chat messages "
        '({"role": ..., "content": ...}).',
        cause="reply",
    )


def text_of(observation: Observation) -> str:
    """An observation as one text."""
    if isinstance(observation, str):
        return observation
    return "\n".join(str(message.get("content") or "") for message in observation)


def messages_of(observation: Observation) -> list[dict[str, Any]]:
    """An observation as chat messages: text is what the user says."""
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    return observation


def action_text(action: Action) -> str:
    """The text of an action that may also come as a chat message or its content parts; a plain
    value as JSON."""
    if isinstance(action, Mapping) and "content" in action:
        action = action["content"] or ""
    if _are_parts(action):
        return "".join(str(part.get("text", "")) for part in action)
    if action is None or isinstance(action, str):
        return action or ""
    return json.dumps(action, default=_as_json)


def _are_parts(action: Action) -> bool:
    """Whether these are a message's content parts, not a list as an action."""
    return isinstance(action, list) and all(
        isinstance(part, Mapping) and ("text" in part or "type" in part) for part in action
    )


def _as_json(value: Any) -> Any:
    """numpy's arrays and numbers as lists and numbers; what JSON cannot say as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def finite_score(value: object, what: str) -> float:
    """A reward or score as a float. Raises EnvError when it is no finite number."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        number = float("nan")
    if number - number != 0:  # NaN or infinite
        raise EnvError(f"The environment's {what} is {value!r}, no finite number.", cause="reply")
    return number
