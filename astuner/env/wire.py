"""The JSON of the HTTP env service that AgentScope Tuner users run.

Every request is a POST of {env_type, task_id, instance_id, messages, params}; every answer is
{success, data}, an error a status with {detail}. A state is a list of chat messages, an
action one. What this project adds is optional on both sides: `/reset`, `/heartbeat`,
`lease` in a request, and `terminated`/`truncated` in `info`. No I/O in here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from astuner.env.protocol import (
    Action,
    Info,
    Observation,
    Start,
    StepResult,
    finite_score,
    messages_of,
)
from astuner.env.served_class import observation_of
from astuner.errors import EnvError

STATUS = {
    "refused": 400,
    "misuse": 400,
    "gone": 404,
    "crashed": 500,
    "reply": 500,
    "unavailable": 503,
    "timeout": 504,
}
"""The status that a cause is answered with."""


class Request(BaseModel):
    """The body of every request."""

    model_config = ConfigDict(extra="ignore")

    env_type: str | None = None
    task_id: str | None = None
    instance_id: str | None = None
    messages: Any = Field(default_factory=dict)
    params: dict[str, Any] = Field(default_factory=dict)
    lease: float | None = None
    """Seconds without a sign of life after which the instance is released."""
    instance_ids: list[str] = Field(default_factory=list)
    """With /heartbeat."""


def start_data(start: Start, instance_id: str, task_id: str) -> dict[str, Any]:
    info = {**start.info, "instance_id": instance_id, "task_id": task_id}
    return {
        "state": messages_of(start.observation),
        "reward": 0.0,
        "is_terminated": False,
        "info": json_safe(info),
    }


def step_data(result: StepResult, instance_id: str) -> dict[str, Any]:
    info = {
        **result.info,
        "instance_id": instance_id,
        "terminated": result.terminated,
        "truncated": result.truncated,
    }
    return {
        "state": messages_of(result.observation or ""),
        "reward": result.reward,
        "is_terminated": result.done,
        "info": json_safe(info),
    }


def read_start(data: Any) -> Start:
    """Raises EnvError for an answer that is none."""
    state, info = _state(data)
    return Start(state, info)


def read_step(data: Any) -> StepResult:
    """Raises EnvError for an answer that is none."""
    state, info = _state(data)
    reply = cast(Mapping[str, Any], data)
    done = bool(reply.get("is_terminated", False))
    truncated = bool(info.get("truncated", False))
    terminated = bool(info.get("terminated", done and not truncated))
    reward = finite_score(reply.get("reward") or 0.0, "reward")
    return StepResult(state, reward, terminated, truncated, info)


def read_action(messages: Any) -> Action:
    """A request's action: the text of its message where it is nothing more (no tool calls, say);
    anything else is an action as it is."""
    if isinstance(messages, Mapping):
        message = cast(Mapping[str, Any], messages)
        if isinstance(message.get("content"), str) and message.keys() <= {"role", "content"}:
            return message["content"]
    return cast(Action, messages)


def read_error(status: int, body: str) -> EnvError:
    """What an answer that is no success means."""
    detail, traceback = _detail(body)
    told = f"The environment service answered {status}: {detail or 'nothing more'}"
    missing = "not found" in detail.lower() or "none of" in detail.lower()
    if status == 404 or (status in (400, 500) and "instance" in detail.lower() and missing):
        return EnvError(told, cause="gone", traceback=traceback)
    if status in (429, 502, 503):
        return EnvError(told, cause="unavailable")
    if status == 504:
        return EnvError(told, cause="timeout")
    if status >= 500:
        return EnvError(told, cause="crashed", traceback=traceback)
    return EnvError(told, cause="refused")


def json_safe(value: Any) -> Any:
    """The value itself where JSON can carry it; numpy's as lists and numbers, NaN and everything
    else as text."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in cast(Sequence[Any], value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    return json_safe(value.tolist()) if hasattr(value, "tolist") else str(value)


def _state(data: Any) -> tuple[Observation, Info]:
    if not isinstance(data, Mapping) or "state" not in data:
        raise EnvError(
            f"The environment service answered {data!r:.200}, without a state.", cause="reply"
        )
    reply = cast(Mapping[str, Any], data)
    info = reply.get("info")
    shown = cast(Info, dict(info)) if isinstance(info, Mapping) else {}  # pyright: ignore
    return observation_of(reply["state"]), shown


def _detail(body: str) -> tuple[str, str]:
    """The last line of an error's detail, and the detail if it is a whole traceback."""
    try:
        told = json.loads(body)
    except ValueError:
        told = body
    detail = told.get("detail", told) if isinstance(told, dict) else told  # pyright: ignore
    text = detail if isinstance(detail, str) else json.dumps(detail)
    lines = text.strip().splitlines()
    return (lines[-1][:500] if lines else ""), (text if len(lines) > 1 else "")
