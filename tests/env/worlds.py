"""Small worlds for tests: one that counts, and one for each kind of trouble."""

from __future__ import annotations

import threading
import time
from typing import Any, ClassVar

LIMIT = 20.0
"""Seconds that no test's wait may exceed."""


class Counting:
    """Say "up" `goal` times; other words change nothing. Reward 1 at the goal."""

    open_now: ClassVar[set[int]] = set()
    """Every instance that was made and not closed."""
    lock = threading.Lock()

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        self.task_id, self.params = task_id, params
        self.goal, self.at = int(params.get("goal", 2)), 0
        self.thread = threading.get_ident()
        with self.lock:
            self.open_now.add(id(self))

    @staticmethod
    def task_ids(split: str) -> list[str]:
        return [f"{split}-{i}" for i in range(3)]

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.at = 0
        return f"{self.task_id}: at 0 of {self.goal}, seed {seed}", {"goal": self.goal}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert threading.get_ident() == self.thread, "every call comes from one thread"
        self.at += action == "up"
        done = self.at >= self.goal
        return f"at {self.at}", float(done), done, False, {"said": action}

    def close(self) -> None:
        with self.lock:
            self.open_now.discard(id(self))


class Scored(Counting):
    def evaluate(self) -> float:
        return 0.25 * self.at


class Weighed(Counting):
    """Its score and what it tells depend on the call's parameters."""

    def evaluate(self, params: dict[str, Any]) -> float:
        return self.at * float(params.get("weight", 1.0))

    def get_info(self, params: dict[str, Any]) -> Any:
        return {"asked": params}


class Attentive(Counting):
    """Its step wants the call's parameters; elsewhere it takes what it is given by position."""

    def step(self, action: Any, params: dict[str, Any]) -> Any:
        observation, reward, *ended, info = super().step(action)
        return observation, reward, *ended, {**info, "params": params}

    def evaluate(self, **named: Any) -> float:
        return self.at + len(named)

    def get_info(self, *given: Any, loud: bool = False) -> Any:
        return {"given": given, "loud": loud}


class OnlyNamed(Counting):
    """Its methods take more, but nothing more by position."""

    def step(self, action: Any, *, twice: bool = False) -> Any:
        return super().step(action)

    def evaluate(self, *, weight: float = 0.5) -> float:
        return self.at * weight

    def get_info(self, what: Any, *, loud: bool = False, **named: Any) -> Any:
        return {"what": what, "loud": loud, "named": named}


class Unscored(Counting):
    def evaluate(self) -> float:
        raise OSError("the scales are broken")


class Broken(Counting):
    """Raises in its second step."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.at == 1:
            raise ZeroDivisionError("the floor gave way")
        return super().step(action)


class RunsOut(Counting):
    """Ends as an iterator does."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return next(iter(()))


class NeverMade(Counting):
    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        raise OSError("no display")


class Silent(Counting):
    """Does not answer a step, until told to."""

    answer = threading.Event()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.answer.wait(LIMIT)
        return super().step(action)


class SlowToMake(Counting):
    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        time.sleep(float(params.get("sleep", 0.3)))
        super().__init__(task_id, params)


class Odd(Counting):
    """Returns what its parameter says."""

    def step(self, action: Any) -> Any:
        return eval(self.params["reply"])  # a literal of the test


class OddStart(Counting):
    """Shows at first what its parameter says."""

    def reset(self, *, seed: int | None = None) -> Any:
        return self.params["shown"], {}


class Served:
    """A class as AgentScope Tuner's env services have them."""

    made: ClassVar[list[str]] = []

    def __init__(self, task_id: str, instance_id: str, params: dict[str, Any]) -> None:
        self.task_id, self.turns = task_id, 0
        self.made.append(instance_id)

    @staticmethod
    def get_query_list(split: str = "train", params: Any = None) -> list[str]:
        return [f"{split}_a", f"{split}_b"]

    def get_init_state(self, params: dict[str, Any]) -> dict[str, Any]:
        return {
            "state": [
                {"role": "system", "content": "You are in a room."},
                {"role": "user", "content": f"Task {self.task_id}."},
            ],
            "info": {"task_id": self.task_id},
        }

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        self.turns += 1
        assert action["role"] == "assistant"
        return {
            "state": [{"role": "user", "content": f"{self.turns}: {action['content']}"}],
            "reward": 0,
            "is_terminated": self.turns == 2,
            "info": {"aloud": True} if params.get("aloud") else {},
        }

    def evaluate(self, messages: Any, params: Any) -> float:
        return (0.25 if params.get("sparse") else 0.5) * self.turns

    def get_info(self, messages: Any, params: Any) -> str:
        return f"one tool, {params}"

    def close(self) -> None:
        self.turns = -1
