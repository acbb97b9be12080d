"""What a judge (or a workflow) returned, as one checked Verdict.

A reward is a finite number, a list of them (one for each LLM call), or either with
`is_success` as a pair. Anything else is a RewardError that says what was seen.
Whether a list has as many entries as there were calls is for whoever knows the
calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from astuner.errors import RewardError

_EXPECTED = (
    "Return a number, (number, is_success), or a list of numbers with one for each LLM call."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reward of one episode."""

    reward: float
    """Finite; of a list, the sum."""
    turn_rewards: tuple[float, ...] | None
    """The list itself, if one was given."""
    is_success: bool | None


def to_verdict(outcome: Any, is_success: bool | None = None) -> Verdict:
    """Read `outcome`: a number (Python, numpy, a tensor of one element; a bool is 1 or 0
    and also says `is_success`), a list or array of numbers, or a pair of either with a
    bool. Raises RewardError."""
    if isinstance(outcome, tuple):
        outcome, is_success = _pair(cast("tuple[Any, ...]", outcome))
    value = _plain(outcome)
    if isinstance(value, list):
        rewards = tuple(_number(_plain(v), f" at turn {i}") for i, v in enumerate(value))
        if not rewards:
            raise RewardError(f"The reward is an empty list. {_EXPECTED}")
        return Verdict(_number(sum(rewards), " (the sum of the list)"), rewards, is_success)
    if isinstance(value, bool) and is_success is None:
        is_success = value
    return Verdict(_number(value), None, is_success)


def _pair(outcome: tuple[Any, ...]) -> tuple[Any, bool | None]:
    success = _plain(outcome[1]) if len(outcome) == 2 else ...
    if success is None or isinstance(success, bool):
        return outcome[0], success
    raise RewardError(
        f"The reward is the tuple {outcome!r}, but a tuple means (reward, is_success) with "
        f"is_success True, False or None. {_EXPECTED}"
    )


def _plain(value: Any) -> Any:
    """numpy scalars and arrays, and tensors, as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any, where: str = "") -> float:
    if value is None:
        raise RewardError(f"The reward{where} is None. Is a `return` missing? {_EXPECTED}")
    if not isinstance(value, Real):
        raise RewardError(
            f"The reward{where} is {value!r} ({type(value).__name__}), not a number. {_EXPECTED}"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"The reward{where} is {number}, which cannot be trained on. "
            "Guard divisions and logarithms in the reward."
        )
    return number
