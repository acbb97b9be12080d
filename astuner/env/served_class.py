"""An environment class of an AgentScope Tuner env service, as a TextEnv.

Such a class has `__init__(task_id, instance_id, params)`, `get_init_state(params)`,
`step(action, params)`, `evaluate(messages, params)`, `get_info(messages, params)`, `close()`
and `get_query_list(split)`; states are chat messages. It knows no reset: a new instance is
made instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from astuner.env.protocol import Action, Info, Observation, action_text, as_observation


def as_message(action: Action) -> dict[str, Any]:
    """An action as the chat message that such services expect."""
    if isinstance(action, Mapping) and "content" in action:
        return {"role": "assistant", **action, "content": action_text(action)}  # pyright: ignore
    return {"role": "assistant", "content": action_text(action)}


def observation_of(state: Any) -> Observation:
    """A service's `state` - a message or several, or text - as an observation: plain text
    where it is one message of plain text. Raises EnvError for a list of anything else."""
    messages = [state] if isinstance(state, Mapping) else state
    if not isinstance(messages, list):
        return str(messages)
    shown = as_observation(messages, "state")  # pyright: ignore[reportUnknownArgumentType]
    if len(shown) == 1 and isinstance(shown, list) and not _is_of_tools(shown[0]):
        content = shown[0].get("content", shown[0].get("error"))
        return content if isinstance(content, str) else shown
    return shown


def _is_of_tools(message: Mapping[str, Any]) -> bool:
    """Whether it says more than its text: to which call it belongs, or which to make."""
    return bool(message.get("tool_call_id") or message.get("tool_calls"))


class ServedClass:
    """One instance of such a class."""

    def __init__(self, cls: Callable[..., Any], task_id: str, params: dict[str, Any]) -> None:
        self._cls = cls
        self._task_id = task_id
        self._params = params
        self._env: Any = None

    def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]:
        self.close()
        if seed is not None:
            self._params["seed"] = seed
        self._env = self._cls(self._task_id, f"instance-{uuid4().hex[:8]}", self._params)
        started = self._env.get_init_state(self._params)
        return observation_of(started["state"]), dict(started.get("info") or {})

    def step(
        self, action: Action, params: Mapping[str, Any] | None = None
    ) -> tuple[Observation, float, bool, bool, Info]:
        reply = self._env.step(as_message(action), {**self._params, **(params or {})})
        info = dict(reply.get("info") or {})
        truncated = bool(info.get("truncated", False))
        ended = bool(reply.get("is_terminated", False))
        reward = float(reply.get("reward") or 0.0)
        return observation_of(reply["state"]), reward, ended and not truncated, truncated, info

    def evaluate(self, params: Mapping[str, Any], messages: Any) -> float:
        return float(self._env.evaluate(messages, {**self._params, **params}))

    def get_info(self, params: Mapping[str, Any], messages: Any) -> Any:
        return self._env.get_info(messages, {**self._params, **params})

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
