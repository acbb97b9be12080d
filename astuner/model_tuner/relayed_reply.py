"""What another endpoint answered, put together from a response or its chunks.

Gives one Call per choice: always the message; token ids, logprobs and weight
version 0 only where the endpoint sent ids with a logprob each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from astuner.model_tuner.session import AgentKey
from astuner.types import Call, FinishReason, token_ids


@dataclass(slots=True)
class _Choice:
    number: int
    message: dict[str, Any] = field(default_factory=lambda: {"role": "assistant", "content": ""})
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    finish: str = ""


class RelayedReplies:
    """The choices of one passed-on request."""

    def __init__(self, agent: AgentKey, request: Mapping[str, Any], n: int) -> None:
        self._agent = agent
        self._request = request
        self._prompt: list[int] = []
        self._choices = [_Choice(agent.session.number()) for _ in range(n)]
        self._started_at = time.time()

    def whole(self, response: Mapping[str, Any]) -> None:
        """Take a response that came in one piece."""
        self._prompt = response.get("prompt_token_ids") or []
        for given in response.get("choices") or ():
            if choice := self._choice(given):
                choice.message = _without_nothing(given.get("message") or {})
                choice.tool_calls = dict(enumerate(choice.message.pop("tool_calls", ())))
                self._tokens(choice, given)

    def chunk(self, event: Mapping[str, Any]) -> bool:
        """Take one chunk; whether a choice ends with it."""
        self._prompt = self._prompt or event.get("prompt_token_ids") or []
        ends = False
        for given in event.get("choices") or ():
            if choice := self._choice(given):
                self._delta(choice, given.get("delta") or {})
                self._tokens(choice, given)
                ends = ends or bool(given.get("finish_reason"))
        return ends

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish for choice in self._choices)

    def calls(self) -> list[tuple[int, Call]]:
        """One for each choice, with its number."""
        return [(choice.number, self._call(choice)) for choice in self._choices]

    def _choice(self, given: Mapping[str, Any]) -> _Choice | None:
        index = given.get("index", 0)
        return self._choices[index] if 0 <= index < len(self._choices) else None

    def _delta(self, choice: _Choice, delta: Mapping[str, Any]) -> None:
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                choice.message[name] = (choice.message.get(name) or "") + delta[name]
        for part in delta.get("tool_calls") or ():
            function = part.get("function") or {}
            call = choice.tool_calls.setdefault(
                part.get("index", 0),
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = part.get("id") or call["id"]
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""

    def _tokens(self, choice: _Choice, given: Mapping[str, Any]) -> None:
        choice.ids += given.get("token_ids") or []
        rows = (given.get("logprobs") or {}).get("content") or ()
        choice.logprobs += [row["logprob"] for row in rows]
        choice.finish = given.get("finish_reason") or choice.finish

    def _call(self, choice: _Choice) -> Call:
        whole = bool(self._prompt) and len(choice.ids) == len(choice.logprobs)
        ids = choice.ids if whole else []
        finish: FinishReason = "length" if choice.finish == "length" else "stop"
        calls = [choice.tool_calls[i] for i in sorted(choice.tool_calls)]
        episode_id = self._agent.session.spec.episode_id
        return Call(
            call_id=f"{episode_id}:{choice.number}",
            episode_id=episode_id,
            agent_name=self._agent.agent_name,
            target_tag=self._agent.target_tag,
            prompt_ids=token_ids(self._prompt if whole else []),
            completion_ids=token_ids(ids),
            logprobs=np.asarray(choice.logprobs if whole else [], np.float32),
            weight_versions=np.zeros(len(ids), np.int32),
            finish_reason=finish,
            request=self._request,
            response={**choice.message, "tool_calls": calls} if calls else choice.message,
            started_at=self._started_at,
            ended_at=time.time(),
            new_timeline_reason="relayed",
        )


def _without_nothing(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without fields that are null, but with its role and content."""
    kept = {name: value for name, value in message.items() if value is not None}
    return {"role": "assistant", "content": None, **kept}
