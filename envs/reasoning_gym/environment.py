"""Reasoning-gym's generated puzzles, each an environment of one step.

`params["dataset"]` names the generator, everything else in `params` goes to it; the seed
makes the puzzle. `reset` asks the question; the step's action is the answer, scored by the
generator's own scorer, and ends the episode. An answer may be marked: <answer>...</answer>,
<action>...</action> or \\boxed{...}.
"""

from __future__ import annotations

import re
from typing import Any

from astuner.env.actions import marked_action
from astuner.env.protocol import Action, Info, action_text
from astuner.errors import EnvError, MissingDependency

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


class Puzzle:
    """One question."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._name = name
        self._options = options
        self._seed = 0
        """The last one given: without a new one, the same question again."""
        self._dataset: Any = None
        self._entry: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None) -> tuple[str, Info]:
        self._seed = self._seed if seed is None else seed
        self._dataset = _dataset(self._name, self._seed, self._options)
        self._entry = self._dataset[0]
        return str(self._entry["question"]), {"dataset": self._name}

    def step(self, action: Action) -> tuple[str, float, bool, bool, Info]:
        answer = answer_in(action_text(action))
        score = float(self._dataset.score_answer(answer, self._entry))
        right = "Right." if score >= 1 else "Not quite right."
        return right, score, True, False, {"answer": answer}


def make(task_id: str, params: dict[str, Any]) -> Puzzle:
    """One puzzle. Raises EnvError for an unknown generator or wrong parameters."""
    options = {key: value for key, value in params.items() if key not in ("seed", "dataset")}
    name = str(params.get("dataset", "chain_sum"))
    _dataset(name, 0, options)
    return Puzzle(name, options)


def answer_in(text: str) -> str:
    """The marked part of a reply, or all of it."""
    found = _ANSWER.findall(text)
    marked = str(found[-1]) if found else marked_action(text)
    return (text if marked is None else marked).strip()


def _dataset(name: str, seed: int, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise MissingDependency(
            "reasoning-gym", "reasoning-gym", "The environment reasoning_gym"
        ) from None
    try:
        return reasoning_gym.create_dataset(name, size=1, seed=seed, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise EnvError(
            f"reasoning-gym refused {name!r} with {options}: {error}", cause="refused"
        ) from None
